"""Sync state of a run per server: the id of the run on the server and the position in the spool."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dl2pa.osutil import write_atomically
from dl2pa.records import DamagedFile, check_record, read_record
from dl2pa.redaction import redact
from dl2pa.rundir import RunDirectory, warn_damaged

_log = logging.getLogger(__name__)
_FIELDS = {"run_id": str, "cursor": int, "pending_artifacts": list, "refused": int}


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
    """Load the state of the server ``uri``; the initial state if there is none or it is damaged.

    From the initial state, all events are sent again, which changes nothing on the server.
    """
    return _servers(run_dir).get(redact(uri), SyncState())


def save_sync_state(run_dir: Path, uri: str, state: SyncState) -> None:
    """Save the state of ``uri``, keyed without credentials. If this fails, events are only sent again."""
    servers = {name: asdict(entry) for name, entry in _servers(run_dir).items() if name != redact(uri)}
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


def _servers(run_dir: Path) -> dict[str, SyncState]:
    """State per server, the last one used last; damaged ones are logged and left out."""
    file, states = RunDirectory(run_dir).sync_state, dict[str, SyncState]()
    try:
        servers = (read_record(file, {"servers": dict}) or {}).get("servers") or {}
        for name, content in servers.items():
            states[name] = _parse(content)
    except DamagedFile as damaged:
        warn_damaged(file, damaged.reason)
    except ValueError as error:
        warn_damaged(file, f"the state of a server is damaged: {error}")
    return states


def _parse(content: Any) -> SyncState:
    """Parse the state of one server.

    Raises:
        ValueError: it is damaged.
    """
    fields = check_record(content, _FIELDS)
    kept = {name: fields[name] for name in _FIELDS if fields.get(name) is not None}
    numbers = [kept.get("cursor", 0), kept.get("refused", 0), *kept.get("pending_artifacts", [])]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("a position is not an integer of at least 0")
    return SyncState(**kept)
