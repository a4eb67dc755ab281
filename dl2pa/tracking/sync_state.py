"""What a run's sender has noted about each server: the run's id there and how much of the spool it took."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dl2pa.redaction import redact
from dl2pa.tracking.files import read_json, write_json
from dl2pa.tracking.spool import events_folder

_log = logging.getLogger(__name__)


@dataclass
class SyncState:
    """One server's state. ``cursor`` moves only after the server accepted what lies before it."""

    run_id: str | None = None
    cursor: int = 0
    """Byte offset in the spool."""
    pending_artifacts: list[int] = field(default_factory=lambda: [])
    """Offsets of artifact events the server would not take while it took the rest."""
    refused: int = 0
    """Entries the server will never take; left out."""


def notes_file(run_dir: Path) -> Path:
    """``RUN/events/mlflow.json``."""
    return events_folder(run_dir) / "mlflow.json"


def load_sync_state(run_dir: Path, uri: str) -> SyncState:
    """What was noted for the server ``uri``; an empty note where there is none."""
    try:
        return SyncState(**_servers(run_dir)[redact(uri)])
    except (KeyError, TypeError):
        return SyncState()


def save_sync_state(run_dir: Path, uri: str, state: SyncState) -> None:
    """Replace the note for ``uri``, keyed without its credentials. A full disk costs a resend, no more."""
    servers = {name: entry for name, entry in _servers(run_dir).items() if name != redact(uri)}
    try:
        write_json(notes_file(run_dir), {"servers": {**servers, redact(uri): asdict(state)}})
    except OSError as error:
        _log.debug("could not note what was sent: %s", error)


def last_server(run_dir: Path) -> str | None:
    """The server sent to last, without its credentials."""
    return next(reversed(_servers(run_dir)), None)


def _servers(run_dir: Path) -> dict[str, Any]:
    servers = (read_json(notes_file(run_dir)) or {}).get("servers")
    return servers if isinstance(servers, dict) else {}
