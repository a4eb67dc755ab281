"""Form of the tracking settings, checked before a run without asking the server. Imports no MLflow."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from dl2pa import envvars
from dl2pa.config.schema import TrackingConfig
from dl2pa.errors import UserError
from dl2pa.redaction import redact

DISABLED = "none"
"""Value of `tracking.uri` for writing only the local spool."""

_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
_MAX_EXPERIMENT_NAME = 500
"""MLflow's limit (3.17), characters."""


def sync_command(configured: str | None, folder: Path, *, every_run: bool = False) -> str:
    """Command that sends spooled events; of a run with `tracking.uri=none` the user names the server.

    Args:
        configured: `tracking.uri` of the run.
        folder: the run directory; with `every_run` the folder of several.
    """
    command = f"dl2pa sync {'--all ' if every_run else ''}{folder}"
    return f"{command} --uri SERVER" if configured == DISABLED else command


def check_tracking(tracking: TrackingConfig) -> None:
    """Check the form of the server's address and of the names.

    Raises:
        UserError: the first invalid setting.
    """
    if not tracking.enabled:
        return
    ambient = os.environ.get(envvars.TRACKING_URI)
    if tracking.uri is not None:
        if tracking.uri != DISABLED:
            check_uri("tracking.uri", tracking.uri)
    elif ambient:
        check_uri(envvars.TRACKING_URI, ambient)
    check_experiment("tracking.experiment", tracking.experiment)


def check_experiment(field: str, name: str) -> None:
    """Refuse a name that MLflow refuses as the name of an experiment.

    Raises:
        UserError: the name is empty, too long, or contains control characters.
    """
    if not name.strip() or len(name) > _MAX_EXPERIMENT_NAME or not name.isprintable():
        message = f"is not a valid name: 1 to {_MAX_EXPERIMENT_NAME} printable characters"
        raise UserError(field, name, message, "Choose another name, for instance imagenet.")


def check_uri(field: str, uri: str) -> None:
    """Refuse a URI that cannot name a tracking server or database, including `none`.

    Raises:
        UserError: the scheme is not supported, or a part is missing or malformed.
    """
    scheme = uri.partition(":")[0].split("+")[0]
    if ":" not in uri or scheme not in _SCHEMES:
        remedy = f"Give a URI that begins with one of {', '.join(f'{s}:' for s in _SCHEMES)}."
        raise UserError(field, redact(uri), "is not the URI of a tracking server or database", remedy)
    if scheme in ("http", "https"):
        message, remedy = server_problem(uri), f"Give {scheme}://HOST:PORT."
    elif scheme == "sqlite":
        rest = uri.partition(":///")[2].partition("?")[0]
        message = None if rest.strip("/") and ":memory:" not in rest else "names no database file"
        remedy = "Give sqlite:///FILE, with a fourth slash for an absolute path."
    else:
        message = None if "://" in uri else "lacks ://"
        remedy = f"Give {uri.partition(':')[0]}://USER@HOST:PORT/DATABASE."
    if message:
        raise UserError(field, redact(uri), message, remedy)


def server_problem(uri: str) -> str | None:
    """Problem of the address of a web server, as the rest of an error message; None if it is valid."""
    if any(character.isspace() or not character.isprintable() for character in uri):
        return "contains white space or a control character"
    try:
        parts = urlsplit(uri)
        parts.port  # noqa: B018  (raises for a port that is not a number)
    except ValueError as error:
        return f"is malformed: {error}"
    return None if parts.hostname else "names no host"
