"""User errors and exit codes. Imports no other module of the project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""Stopped on request; the same command resumes (EX_TEMPFAIL of sysexits)."""
EXIT_INTERRUPTED = 130
"""Ended by Ctrl-C or SIGTERM before it was finished."""

TRANSIENT_FIELDS = ("run-dir", "node name")
"""Fields of user errors that another attempt may not have: a run directory in use becomes free when its owner ends."""

_MAX_LENGTH = 1000
"""Maximum length of the value and of the reason in a message, in characters."""

_MAX_LINES = 30
"""Maximum number of problems in one message."""


def printable(text: str) -> str:
    """Escape control characters other than line ends and tabs, so that terminals do not interpret them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}…"


def install_command(extra: str) -> str:
    """Command that installs an optional part of the project (an extra of pyproject.toml), run in the checkout."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


class UserError(ValueError):
    """Invalid user input, reported as one message; exit code 2.

    Args:
        field: the invalid config key, option or file, as the user wrote it.
        value: its value.
        message: what is wrong with it.
        remedy: what to do.

    Attributes:
        place: file and line that set the value, `FILE:LINE`; None if it is not from a file.
    """

    place: str | None = None

    def __init__(self, field: str, value: Any, message: str, remedy: str) -> None:
        super().__init__(field, value, message, remedy)
        self.field = field
        self.value = value
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        place = f" ({self.place})" if self.place else ""
        return printable(f"{self.field}={_cut(repr(self.value))}: {_cut(self.message)}. {self.remedy}{place}")

    @property
    def problems(self) -> tuple[UserError, ...]:
        """Each problem as an error of its own; at least one."""
        return (self,)

    def as_dict(self) -> dict[str, Any]:
        """JSON form, as printed with ``--json``; the place only if there is one."""
        value = self.value if isinstance(self.value, bool | int | float | str | None) else str(self.value)
        result = {"field": self.field, "value": value, "message": self.message, "remedy": self.remedy}
        return result | ({"place": self.place} if self.place else {})

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> UserError:
        """Inverse of `as_dict`."""
        if "problems" in fields:
            return UserErrors([UserError.from_dict(problem) for problem in fields["problems"]])
        error = UserError(fields["field"], fields["value"], fields["message"], fields["remedy"])
        error.place = fields.get("place")
        return error


class UserErrors(UserError):
    """Several problems of one input, reported together; field, value, message and remedy are those of the first."""

    def __init__(self, problems: Sequence[UserError]) -> None:
        first = problems[0]
        super().__init__(first.field, first.value, first.message, first.remedy)
        self.place = first.place
        self._problems = tuple(problems)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._problems,)

    def __str__(self) -> str:
        """Number of problems, then one line per problem."""
        lines = [f"  {problem}" for problem in self._problems[:_MAX_LINES]]
        more = len(self._problems) - len(lines)
        return "\n".join(
            [f"{len(self._problems)} problems:", *lines, *([f"  and at least {more} more"] if more else [])]
        )

    @property
    def problems(self) -> tuple[UserError, ...]:
        return self._problems

    def as_dict(self) -> dict[str, Any]:
        """JSON form of the first problem, and `problems`: that of each."""
        return {**super().as_dict(), "problems": [problem.as_dict() for problem in self._problems]}


class TrainingFailure(RuntimeError):
    """Failure of training, such as a non-finite loss or different assignments on two ranks; exit code 1."""


class StorageUnavailable(Exception):
    """Object storage that does not answer for a long time; exit code 1, and another attempt continues the run."""


class TakenOver(TrainingFailure):
    """Another process owns the run directory now; nothing may be written to it, not even this error."""
