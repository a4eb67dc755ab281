"""Content of a message about a run, from the small files of its run directory."""

from __future__ import annotations

import html
import os
import socket
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from dl2pa.errors import printable
from dl2pa.redaction import redact, redact_tree
from dl2pa.rundir import RunDirectory
from dl2pa.training.display import duration

FINISHED, FAILED, GAVE_UP, STALLED = "finished", "failed", "gave_up", "stalled"
SWEEP_ENDED = "sweep_ended"
EVENTS = (FINISHED, FAILED, GAVE_UP, STALLED)
NO_EVENT = "-"
"""In place of an event: the supervisor ends without a message, as after a stop on request."""
_WORDS = {GAVE_UP: "gave up", SWEEP_ENDED: "ended"}
_MAX_TEXT = 500
_ACCURACIES = ("top1", "top1_best", "epoch_last", "epoch_best")
_PROGRESS = ("attempt", "epoch", "epochs", "step", "total_steps")


def run_message(run: RunDirectory, event: str, detail: str, name: str, key: str) -> dict[str, Any]:
    """Message about a run as a JSON object.

    Args:
        event: one of `EVENTS`.
        detail: reason of the event; empty if there is none to add.
        name: name of the run.
        key: identifies the event within the run; receivers can recognize a repetition by the `id` made from it.
    """
    status, now = run.status(), time.time()
    accuracy = {name: status.get(name) for name in _ACCURACIES}
    message = _clean(detail) or _default_text(event, accuracy)
    fields = {
        "id": f"{run.root.absolute()}:{key}",
        "event": event,
        "run": _clean(name),
        "run_dir": _clean(str(run.root.absolute())),
        "message": message,
        "accuracy": accuracy,
        "progress": {name: status.get(name) for name in _PROGRESS},
        "times": _times(status, now),
        "host": socket.gethostname(),
        "job_id": os.environ.get("SLURM_JOB_ID"),
    }
    return with_text(fields)


def with_text(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Add `text`, the message in one line as Slack shows it, and remove secrets from all fields."""
    event = fields["event"]
    text = f"dl2pa: {fields['run']} {_WORDS.get(event, event)}: {fields['message']}"
    seconds = fields["times"].get("seconds")
    text += f" (after {duration(seconds)})" if seconds else ""
    # Slack reads <...> as a link or a mention of everyone.
    return {**redact_tree(fields), "text": html.escape(redact(text), quote=False)}


def _default_text(event: str, accuracy: Mapping[str, Any]) -> str:
    last, best = accuracy["top1"], accuracy["top1_best"]
    if event != FINISHED or last is None:
        return event
    better = f", best {best:.2f} % in epoch {accuracy['epoch_best']}" if best is not None else ""
    return f"top-1 {last:.2f} %{better}"


def _times(status: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Times in UTC as ISO 8601; `seconds` since the first attempt began."""
    started = status.get("started") or status.get("attempt_started")
    return {
        "event": iso(now),
        "started": iso(started),
        "attempt_started": iso(status.get("attempt_started")),
        "seconds": None if started is None else round(max(0.0, now - started), 1),
    }


def iso(seconds: float | None) -> str | None:
    """Time since 1970 as ISO 8601 in UTC; None for a time that a calendar cannot express."""
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return None


def _clean(text: str) -> str:
    """One line without secrets and control characters, of limited length."""
    line = " ".join(printable(redact(text)).split())
    return line if len(line) <= _MAX_TEXT else f"{line[:_MAX_TEXT]}…"
