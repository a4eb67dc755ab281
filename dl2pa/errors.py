"""User errors and exit codes. Imports no other module of the project."""

from __future__ import annotations

from typing import Any

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""Stopped on request; the same command resumes (EX_TEMPFAIL of sysexits)."""

TRANSIENT_FIELDS = ("run-dir", "node name")
"""Fields of user errors that another attempt may not have: a run directory in use becomes free when its owner ends."""

_MAX_LENGTH = 1000
"""Maximum length of the value and of the reason in a message, in characters."""


def printable(text: str) -> str:
    """Escape control characters other than line ends and tabs, so that terminals do not interpret them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}…"


class UserError(ValueError):
    """Invalid user input, reported as one message; exit code 2.

    Args:
        field: the invalid config key, option or file, as the user wrote it.
        value: its value.
        message: what is wrong with it.
        remedy: what to do.
    """

    def __init__(self, field: str, value: Any, message: str, remedy: str) -> None:
        super().__init__(field, value, message, remedy)
        self.field = field
        self.value = value
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return printable(f"{self.field}={_cut(repr(self.value))}: {_cut(self.message)}. {self.remedy}")

    def as_dict(self) -> dict[str, Any]:
        """JSON form, as printed with ``--json``."""
        value = self.value if isinstance(self.value, bool | int | float | str | None) else str(self.value)
        return {"field": self.field, "value": value, "message": self.message, "remedy": self.remedy}


class TrainingFailure(RuntimeError):
    """Failure of training, such as a non-finite loss or different assignments on two ranks; exit code 1."""


class TakenOver(TrainingFailure):
    """Another process owns the run directory now; nothing may be written to it, not even this error."""
