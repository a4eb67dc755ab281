"""The errors a person can meet, and the exit codes they end with. A leaf: every package may import it."""

from __future__ import annotations

from typing import Any

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""Stopped on request; the same command goes on from there (sysexits' EX_TEMPFAIL)."""


_MOST_SHOWN = 1000
"""Characters of a value or a reason in a message."""


def printable(text: str) -> str:
    """``text`` with control characters other than line ends and tabs written as escapes: a terminal obeys them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


class UserError(ValueError):
    """The user's input is wrong: one message naming the field, the value seen and the remedy; exit code 2.

    Args:
        field: what is wrong, as the user wrote it: a config key, an option, a file.
        value: the value seen.
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
        return printable(f"{self.field} = {_cut(repr(self.value))}: {_cut(self.message)}. {self.remedy}")

    def as_dict(self) -> dict[str, Any]:
        """The machine-readable form printed by ``--json``."""
        value = self.value if isinstance(self.value, bool | int | float | str | None) else str(self.value)
        return {"field": self.field, "value": value, "message": self.message, "remedy": self.remedy}


class TrainingFailure(RuntimeError):
    """Training itself went wrong (a non-finite loss, ranks that disagree); exit code 1."""
