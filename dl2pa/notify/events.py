"""Events of a run, each announced at most once across requeues and restarts.

A file per event in the run directory is created, exclusively, before the message is sent. If the supervisor is killed
in between, the message is lost; it is never repeated.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from dl2pa.config.schema import NotifyConfig
from dl2pa.notify.deliver import deliver
from dl2pa.notify.message import run_message
from dl2pa.osutil import write_json
from dl2pa.rundir import RunDirectory


def announce(
    run: RunDirectory, notify: NotifyConfig, event: str, detail: str, name: str, key: str
) -> list[str]:
    """Send a message about an event unless it was announced before; returns the problems of the delivery.

    Args:
        key: identifies the event; also the name of its file.
    """
    record: dict[str, Any] = {"event": event, "time": time.time(), "outcome": "being sent"}
    path = run.notifications / f"{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
    except OSError as error:
        if path.is_file():  # announced before
            return []
        # Without a record, every attempt would send the message again.
        return [f"{path} cannot be written ({error.strerror})"]
    with suppress(OSError):
        write_json(path, record)
    problems = deliver(notify, run_message(run, event, detail, name, key))
    with suppress(OSError):
        write_json(path, {**record, "outcome": "; ".join(problems) or "delivered"})
    return problems
