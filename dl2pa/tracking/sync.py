"""Send what a server missed, after the fact: ``dl2pa sync RUN``."""

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
from dl2pa.tracking.delivery import Delivery, count_events
from dl2pa.tracking.filelock import Busy, exclusive_lock
from dl2pa.tracking.nodes import OtherNodes
from dl2pa.tracking.server import RunDeleted, set_client_defaults, sqlite_file
from dl2pa.tracking.spool import Spool, load_identity
from dl2pa.tracking.sync_state import last_server

_log = logging.getLogger(__name__)

_CREDENTIALS = (
    *(
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "MLFLOW_TRACKING_AUTH",
    ),
    *("MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_CLIENT_CERT_PATH"),
)
_CREDENTIALS_FILE = Path("~/.mlflow/credentials")


@dataclass(frozen=True)
class SyncReport:
    """What one ``sync`` did."""

    run_dir: Path
    uri: str
    """The server, without credentials."""
    run_id: str | None
    """MLflow's id; None when the server never answered."""
    events_sent: int
    points_sent: int
    already_there: int
    """Events the server had before."""
    left: int
    """Events it still does not have."""
    refused: int
    """Entries it will never take."""
    error: str | None
    """Why something is left, without secrets."""


def sync(
    run_dir: Path,
    uri: str | None = None,
    experiment: str | None = None,
    *,
    recorded: str | None = None,
    alive: bool = True,
    tries: int = 3,
) -> SyncReport:
    """Send a run's spool to a server, only what that server does not have; doing it again sends nothing.

    Args:
        run_dir: the run directory.
        uri: the server that the user names.
        recorded: the server that the run directory names; by default the one the run was sent to, or
            ``MLFLOW_TRACKING_URI``.
        experiment: for a run that is new on the server; by default the run's own.
        alive: whether the run's process lives. One that is gone without an end is closed as KILLED.
        tries: how often to try a server that does not answer.

    Raises:
        UserError: the folder holds no spool, or no server is known.
    """
    spool = RunDirectory(run_dir).spool
    if not spool.exists():
        raise UserError(
            "run", str(run_dir), "holds no tracking events", "Name a run directory of dl2pa train."
        )
    given = uri
    uri = resolve_uri(run_dir, given, recorded)
    trusted = given is not None or uri == os.environ.get(envvars.TRACKING_URI)
    set_client_defaults()
    if not alive:
        close_killed(run_dir)
    delivery = Delivery(run_dir, uri, experiment, trusted=trusted)
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
            error = redact(f"{type(failure).__name__}: {failure}")
    return SyncReport(
        run_dir=run_dir,
        uri=redact(uri),
        run_id=delivery.run_id,
        events_sent=delivery.events_sent,
        points_sent=delivery.points_sent,
        already_there=already,
        left=delivery.left(),
        refused=delivery.refused,
        error=error,
    )


def close_killed(run_dir: Path) -> bool:
    """Give a run whose process is gone the end event it could not write; whether it lacked one.

    Only for a run that is known to be dead. A later attempt reopens it.
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


def resolve_uri(run_dir: Path, uri: str | None, recorded: str | None = None) -> str:
    """The server to send to: `uri`, else the run's own.

    The run directory may be somebody else's. A server that only it names is used where that gives no
    credentials away and writes nowhere but beside the run.

    Raises:
        UserError: no server is known, or the run's own must be named by the user.
    """
    if load_identity(run_dir) is None:
        raise UserError("run", str(run_dir), "has lost its identity", "Restore events/run.json.")
    if uri is not None:
        return uri
    noted, ambient = recorded or last_server(run_dir), os.environ.get(envvars.TRACKING_URI)
    if ambient and (noted is None or redact(ambient) == redact(noted)):
        return ambient
    if noted is None:
        raise UserError("uri", None, "no tracking server is known for this run", "Give --uri.")
    if has_hidden_credentials(noted):
        raise UserError("uri", noted, "needs credentials, which are never stored", "Give the full --uri.")
    if not _is_harmless(noted, run_dir):
        remedy = f"If you trust it: --uri {noted}, or MLFLOW_TRACKING_URI={noted}."
        raise UserError("uri", noted, "is named by the run directory only", remedy)
    return noted


def _is_harmless(uri: str, run_dir: Path) -> bool:
    """Whether sending there can neither give credentials away nor write outside the run's own folder."""
    database = sqlite_file(uri)
    if database is not None:
        return database.resolve().parent in (run_dir.resolve().parent, run_dir.resolve())
    return uri.startswith(("http://", "https://")) and not _has_ambient_credentials()


def _has_ambient_credentials() -> bool:
    """Whether MLflow would send credentials of this user to any server it is told of."""
    return any(os.environ.get(name) for name in _CREDENTIALS) or _CREDENTIALS_FILE.expanduser().exists()
