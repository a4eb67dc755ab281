"""Distinguish a tracking server that refuses a request from one that does not answer."""

from __future__ import annotations

from typing import NamedTuple

from dl2pa.redaction import redact

_MAX_LENGTH = 300


class ExperimentDeleted(RuntimeError):
    """The experiment was deleted on the server; a run can be created in it after it is restored."""


class Refusal(NamedTuple):
    """Why a request fails again if it is repeated unchanged.

    Attributes:
        reason: words of the server, on one line, without secrets.
        remedy: what to do.
    """

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}. {self.remedy}"


_BY_TEXT = (
    (
        "out-of-date database schema",
        "Use the MLflow version of the database, or migrate it with `mlflow db upgrade`.",
    ),
    ("Can't locate revision", "Use the MLflow version that made the database; the installed one is older."),
    ("file is not a database", "Name another file in tracking.uri."),
    ("unable to open database file", "Name a folder in tracking.uri that this user may write to."),
    ("readonly database", "Name a file in tracking.uri that this user may write to."),
    ("CERTIFICATE_VERIFY_FAILED", "Set REQUESTS_CA_BUNDLE to the file of the certificate authority."),
    ("not in a valid JSON format", "Correct tracking.uri: the answer is not one of MLflow."),
    ("failed with error code 404", "Correct tracking.uri: there is no MLflow at this address."),
)
_BY_CODE = {
    "UNAUTHENTICATED": "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
    "PERMISSION_DENIED": "Ask for the permission to write, or set another tracking.experiment.",
    "ENDPOINT_NOT_FOUND": "Correct tracking.uri: there is no MLflow at this address.",
    "INVALID_PARAMETER_VALUE": "Change the setting that the server names.",
    "BAD_REQUEST": "Change the setting that the server names.",
    "INVALID_STATE": "Change the setting that the server names.",
}


def refusal(error: BaseException) -> Refusal | None:
    """Reason and remedy if the server refuses; None if it may answer later (unreachable, overloaded, restarting)."""
    text = brief(error)
    if isinstance(error, ExperimentDeleted):
        return Refusal(text, "Restore it with `mlflow experiments restore`.")
    if isinstance(error, ModuleNotFoundError):
        return Refusal(text, f"Install {error.name}, which this database needs.")
    for words, remedy in _BY_TEXT:
        if words in str(error):
            return Refusal(text, remedy)
    remedy = _BY_CODE.get(str(getattr(error, "error_code", "")))
    return None if remedy is None else Refusal(text, remedy)


def brief(error: BaseException) -> str:
    """Error on one line, without secrets and without traceback."""
    text = " ".join(redact(f"{type(error).__name__}: {error}").split()).rstrip(".")
    return text if len(text) <= _MAX_LENGTH else text[: _MAX_LENGTH - 1] + "…"
