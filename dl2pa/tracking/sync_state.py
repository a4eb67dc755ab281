"""Sync state of a run per server: the id of the run on the server and the position in the spool."""

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
    """State of one server. ``cursor`` advances only after the server has accepted the events before it."""

    run_id: str | None = None
    cursor: int = 0
    """Byte offset in the spool."""
    pending_artifacts: list[int] = field(default_factory=lambda: [])
    """Spool offsets of artifact events that could not be sent and are retried."""
    refused: int = 0
    """Number of entries that the server rejected permanently."""


def load_sync_state(run_dir: Path, uri: str) -> SyncState:
    """Load the state of the server ``uri``; the initial state if there is none."""
    try:
        return SyncState(**_servers(run_dir)[redact(uri)])
    except (KeyError, TypeError):
        return SyncState()


def save_sync_state(run_dir: Path, uri: str, state: SyncState) -> None:
    """Save the state of ``uri``, keyed without credentials. If this fails, events are only sent again."""
    servers = {name: entry for name, entry in _servers(run_dir).items() if name != redact(uri)}
    content = {"servers": {**servers, redact(uri): asdict(state)}}
    try:
        write_atomically(RunDirectory(run_dir).sync_state, json.dumps(content), durable=False)
    except OSError as error:
        _log.debug("could not save the sync state: %s", error)


def forget_runs(run_dir: Path) -> None:
    """Forget what was sent, but keep the addresses of the servers.

    Raises:
        OSError: the state cannot be written.
    """
    content = {"servers": {name: asdict(SyncState()) for name in _servers(run_dir)}}
    write_atomically(RunDirectory(run_dir).sync_state, json.dumps(content))


def last_server(run_dir: Path) -> str | None:
    """Return the URI of the last server, without credentials."""
    return next(reversed(_servers(run_dir)), None)


def _servers(run_dir: Path) -> dict[str, Any]:
    servers = read_json(RunDirectory(run_dir).sync_state).get("servers")
    return servers if isinstance(servers, dict) else {}
