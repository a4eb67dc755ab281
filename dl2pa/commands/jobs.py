"""`dl2pa jobs`: this user's runs on the cluster, how far they are and when they will be done."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dl2pa.commands.output import note
from dl2pa.errors import EXIT_DONE
from launcher import jobs

_COLUMNS = ("job_id", "state", "nodes", "attempt", "epoch", "step", "images/s", "eta", "top1", "run_dir")


def run(args: argparse.Namespace) -> int:
    named = [run_dir for job in args.job for run_dir in jobs.find_runs(job)]
    runs = named or _everything()
    ids = {run_dir: str(jobs.read_job(run_dir).get("job_id")) for run_dir in runs}
    try:
        states = jobs.states(ids.values())
    except ConnectionError as error:
        note(str(error))
        states = dict.fromkeys(ids.values(), jobs.UNKNOWN)
    rows = [describe(run_dir, job_id, states[job_id]) for run_dir, job_id in ids.items()]
    if not named and not args.all:
        rows = [row for row in rows if row["live"]] or rows[-20:]
    if args.json:
        print(json.dumps(rows), flush=True)  # noqa: T201
        return EXIT_DONE
    if not rows:
        note("no run was submitted from here")
    else:
        _print_table(rows)
    if any(row["state"] == "UNKNOWN" for row in rows) and not jobs.has_accounting():
        note(
            "UNKNOWN: the job has left the queue and this cluster keeps no accounts (no sacct); see run_state"
        )
    return EXIT_DONE


def describe(run_dir: Path, job_id: str, state: jobs.JobState) -> dict[str, Any]:
    """One run: what SLURM says of its job, and what its own status says."""
    from dl2pa.training.rundir import RunDirectory

    status = RunDirectory(run_dir).status()
    return {
        "job_id": job_id,
        "state": state.state,
        "reason": state.reason or None,
        "nodes": state.nodes or None,
        "attempt": status.get("attempt", 0),
        "epoch": status.get("epoch", 0),
        "step": status.get("step", 0),
        "total_steps": status.get("total_steps"),
        "images_per_second": status.get("images_per_second"),
        "eta_seconds": seconds_left(status, run_dir) if state.is_live else None,
        "top1": status.get("top1"),
        "run_state": status.get("state"),
        "run_dir": str(run_dir),
        "live": state.is_live,
    }


def seconds_left(status: dict[str, Any], run_dir: Path) -> float | None:
    """Time that the run's remaining steps take at its last speed; None where that is not known."""
    from dl2pa.config import load_config

    speed, step, total = (status.get(k) for k in ("images_per_second", "step", "total_steps"))
    if not speed or step is None or not total:
        return None
    return (total - step) * load_config(run_dir / "slurm/config.yaml").train.batch_size / speed


def _everything() -> list[Path]:
    found = dict.fromkeys(jobs.known_runs())
    for path in sorted(Path("runs").glob(f"*/{jobs.JOB_FILE}")):
        found[path.parents[1].absolute()] = None
    return list(found)


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = [dict(zip(_COLUMNS, _COLUMNS, strict=True)), *(_texts(row) for row in rows)]
    widths = {c: max(len(line[c]) for line in table) for c in _COLUMNS}
    lines = ["  ".join(line[c].ljust(widths[c]) for c in _COLUMNS).rstrip() for line in table]
    print("\n".join(lines), flush=True)  # noqa: T201


def _texts(row: dict[str, Any]) -> dict[str, str]:
    state = row["state"] if row["state"] != "UNKNOWN" else f"UNKNOWN ({row['run_state'] or 'not started'})"
    if row["reason"] and row["reason"] != "None":
        state = f"{state} ({row['reason']})"
    of_total = f"{row['step']}/{row['total_steps']}" if row["total_steps"] else str(row["step"])
    return {
        "job_id": row["job_id"],
        "state": state,
        "nodes": row["nodes"] or "-",
        "attempt": str(row["attempt"]),
        "epoch": str(row["epoch"]),
        "step": of_total,
        "images/s": "-" if row["images_per_second"] is None else f"{row['images_per_second']:,.0f}",
        "eta": "-" if row["eta_seconds"] is None else _duration(row["eta_seconds"]),
        "top1": "-" if row["top1"] is None else f"{row['top1']:.2f}",
        "run_dir": row["run_dir"],
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
