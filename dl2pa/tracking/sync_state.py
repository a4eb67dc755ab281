"""What a run's sender has noted about each server: the run's id there and how much of the spool it took."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dl2pa.osutil import read_json, write_atomically
from dl2pa.redaction import redact
from dl2pa.rundir import RunDirectory

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


def load_sync_state(run_dir: Path, uri: str) -> SyncState:
    """What was noted for the server ``uri``; an empty note where there is none."""
    try:
        return SyncState(**_servers(run_dir)[redact(uri)])
    except (KeyError, TypeError):
        return SyncState()


def save_sync_state(run_dir: Path, uri: str, state: SyncState) -> None:
    """Replace the note for ``uri``, keyed without its credentials. A full disk costs a resend, no more."""
    servers = {name: entry for name, entry in _servers(run_dir).items() if name != redact(uri)}
    content = {"servers": {**servers, redact(uri): asdict(state)}}
    try:
        write_atomically(RunDirectory(run_dir).sync_state, json.dumps(content), durable=False)
    except OSError as error:
        _log.debug("could not note what was sent: %s", error)


def last_server(run_dir: Path) -> str | None:
    """The server sent to last, without its credentials."""
    return next(reversed(_servers(run_dir)), None)


def _servers(run_dir: Path) -> dict[str, Any]:
    servers = read_json(RunDirectory(run_dir).sync_state).get("servers")
    return servers if isinstance(servers, dict) else {}
