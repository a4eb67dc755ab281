"""Summary message of a sweep on this machine, in addition to those of its runs."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dl2pa.config.schema import NotifyConfig
from dl2pa.notify.deliver import deliver
from dl2pa.notify.message import SWEEP_ENDED, iso, with_text


def announce_sweep(
    notify: NotifyConfig, tag: str, records: Sequence[Mapping[str, Any]], started: float
) -> list[str]:
    """Send the numbers of finished and failed runs and the best accuracy; returns the problems of the delivery.

    Args:
        records: outcome of each run: `outcome`, `top1_last`, `top1_best`, `swept`, `run_dir`.
        started: time at which the sweep began, seconds since 1970.
    """
    states = [str(record["outcome"]) for record in records]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    message = ", ".join(f"{count} {state}" for state, count in counts.items())
    best = max((r for r in records if r["top1_best"] is not None), key=lambda r: r["top1_best"], default=None)
    if best is not None:
        message += f"; best top-1 {best['top1_best']:.2f} % ({' '.join(best['swept']) or best['run_dir']})"
    now = time.time()
    times = {"event": iso(now), "started": iso(started), "seconds": round(now - started, 1)}
    fields = {
        "id": f"{tag}:{SWEEP_ENDED}-{started:.0f}",
        "event": SWEEP_ENDED,
        "run": f"sweep {tag}",
        "run_dir": None,
        "message": message,
        "accuracy": {key: None if best is None else best[key] for key in ("top1_last", "top1_best")},
        "counts": counts,
        "times": times,
        "host": socket.gethostname(),
        "job_id": None,
    }
    return deliver(notify, with_text(fields))
