"""Send the events that a server does not have yet: ``dl2pa sync RUN``."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from dl2pa import envvars
from dl2pa.errors import UserError
from dl2pa.redaction import has_hidden_credentials, redact
from dl2pa.rundir import RunDirectory
from dl2pa.tracking.copies import detach_copy, find_original
from dl2pa.tracking.delivery import Delivery, count_events
from dl2pa.tracking.filelock import Busy, exclusive_lock
from dl2pa.tracking.nodes import OtherNodes
from dl2pa.tracking.refusal import refusal
from dl2pa.tracking.server import RunDeleted, choose_uri, set_client_defaults, sqlite_file
from dl2pa.tracking.spool import Spool, load_identity
from dl2pa.tracking.sync_state import last_server

_log = logging.getLogger(__name__)

_CREDENTIALS = tuple(
    f"MLFLOW_TRACKING_{name}"
    for name in ("USERNAME", "PASSWORD", "TOKEN", "AUTH", "AWS_SIGV4", "CLIENT_CERT_PATH")
)
_NAME_SERVER = f"Give --uri SERVER, or set {envvars.TRACKING_URI}."
_CREDENTIALS_FILE = Path("~/.mlflow/credentials")


@dataclass(frozen=True)
class SyncReport:
    """Result of one ``sync``."""

    run_dir: Path
    uri: str
    """The server, without credentials."""
    run_id: str | None
    """MLflow's id of the run; None if the server never answered."""
    events_sent: int
    points_sent: int
    already_there: int
    """Events that the server had before."""
    left: int
    """Events that were not sent."""
    refused: int
    """Entries that the server rejected permanently."""
    error: str | None
    """Reason why events were not sent, without secrets."""


def sync(
    run_dir: Path,
    uri: str | None = None,
    *,
    recorded: str | None = None,
    alive: bool = True,
    tries: int = 3,
) -> SyncReport:
    """Send the events of a run that a server does not have yet; repeating this sends nothing.

    Args:
        run_dir: the run directory.
        uri: the server named by the user.
        recorded: the server named by the run directory; by default the one the run was last sent to, or
            ``MLFLOW_TRACKING_URI``.
        alive: whether the process of the run is alive. A dead run without an end event is ended as KILLED.
        tries: maximum number of tries if the server does not answer.

    Raises:
        UserError: the folder contains no spool, or no server is known.
    """
    spool = RunDirectory(run_dir).spool
    if not spool.exists():
        remedy = "Name a run directory of `dl2pa train`."
        raise UserError("run", str(run_dir), "contains no tracking events", remedy)
    server = resolve_uri(run_dir, uri, recorded)
    trusted = uri is not None or server == os.environ.get(envvars.TRACKING_URI)
    set_client_defaults()
    if find_original(run_dir) is not None and _has_unsent(run_dir, server, alive=alive):
        detach_copy(run_dir)
    if not alive:
        close_killed(run_dir)
    delivery = Delivery(run_dir, server, trusted=trusted)
    already = count_events(spool, end=delivery.cursor)
    error: str | None = None
    for attempt in range(tries):
        if attempt:
            time.sleep(min(2.0 ** (attempt - 1), 4.0))
        try:
            delivery.send(with_pending=True)
            error = None
            break
        except Busy as busy:
            error = "another process is sending this run"
            _log.debug("%s: %s", error, busy)
        except UserError:
            raise
        except RunDeleted as deleted:
            error = str(deleted)
            break
        except Exception as failure:
            refused = refusal(failure)
            if refused is not None:
                error = f"the server refuses the events: {refused}"
                break
            error = redact(f"{type(failure).__name__}: {failure}")
    return SyncReport(
        run_dir=run_dir,
        uri=redact(server),
        run_id=delivery.run_id,
        events_sent=delivery.events_sent,
        points_sent=delivery.points_sent,
        already_there=already,
        left=delivery.left(),
        refused=delivery.refused,
        error=error,
    )


def _has_unsent(run_dir: Path, server: str, *, alive: bool) -> bool:
    """Whether a run has events that the server does not have, or lacks the end event of a killed attempt."""
    if not Delivery(run_dir, server).is_done(with_pending=True):
        return True
    spool = Spool(run_dir, 0)
    try:
        return not alive and spool.unended() is not None
    finally:
        spool.close()


def close_killed(run_dir: Path) -> bool:
    """Add the missing end event of a dead run; return whether it was missing.

    Only for a run whose process has ended. A later attempt sets it to RUNNING again.
    """
    try:
        with exclusive_lock(RunDirectory(run_dir).sync_lock):
            spool = Spool(run_dir, 0)
            attempt = spool.unended()
            if attempt is not None:
                spool.attempt = attempt
                OtherNodes(run_dir).collect(spool.metrics)
                spool.end_killed()
                spool.flush()
            spool.close()
            return attempt is not None
    except Busy:
        return False


def recorded_server(run_dir: Path, configured: str | None) -> str | None:
    """The server of a run by its configuration, else the one it was last sent to, else the default of its folder.

    A SQLite file is not taken from the last sending: the default store moves with the folder of the runs.

    Args:
        configured: `tracking.uri` of the run, which lacks a server that `MLFLOW_TRACKING_URI` named in training.
    """
    last = last_server(run_dir) if configured is None else None
    if last is not None and sqlite_file(last) is None:
        configured = last
    return choose_uri(configured, run_dir.absolute().parent)


def resolve_uri(run_dir: Path, uri: str | None, recorded: str | None = None) -> str:
    """Choose the server: `uri`, otherwise the one recorded for the run.

    The run directory may come from another user. A server that only the run directory names is used only if this
    sends no credentials and writes only to the folder of the run.

    Raises:
        UserError: no server is known, or the user must name the recorded server explicitly.
    """
    if load_identity(run_dir) is None:
        raise UserError("run", str(run_dir), "has no readable identity", "Restore events/run.json.")
    if uri is not None:
        return uri
    if recorded is not None and has_hidden_credentials(recorded):
        recorded = None
    last, ambient = recorded or last_server(run_dir), os.environ.get(envvars.TRACKING_URI)
    if ambient and (last is None or redact(ambient) == redact(last)):
        return ambient
    if last is None:
        raise UserError("--uri", None, "no tracking server is known for this run", _NAME_SERVER)
    if has_hidden_credentials(last):
        raise UserError("uri", last, "needs credentials, which are never stored", "Give the full --uri.")
    if not _is_harmless(last, run_dir):
        remedy = f"If you trust the server, give --uri {last} or set MLFLOW_TRACKING_URI={last}."
        raise UserError("uri", last, "is named only by the run directory", remedy)
    return last


def _is_harmless(uri: str, run_dir: Path) -> bool:
    """Return whether sending to the server sends no credentials and writes only to the folder of the run."""
    database = sqlite_file(uri)
    if database is not None:
        return database.resolve().parent in (run_dir.resolve().parent, run_dir.resolve())
    return uri.startswith(("http://", "https://")) and not _has_ambient_credentials()


def _has_ambient_credentials() -> bool:
    """Return whether MLflow would send credentials of this user to any server."""
    return any(os.environ.get(name) for name in _CREDENTIALS) or _CREDENTIALS_FILE.expanduser().exists()
