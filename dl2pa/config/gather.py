"""Collection of the problems that several checks find, so that they are reported together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from types import TracebackType
from typing import ParamSpec

from dl2pa.errors import UserError, UserErrors

P = ParamSpec("P")


class UnsetKey(LookupError):
    """A check reads a key that has no valid value; the check cannot be made."""


class Problems:
    """Problems that were found so far, each once.

    Use it as a context manager around each check: `with problems: check_loader(config)`. A check that reads a key
    without a valid value is skipped; the key has its own problem.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], UserError] = {}

    def __enter__(self) -> Problems:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if isinstance(error, UserError):
            self.add(error)
        return isinstance(error, UserError | UnsetKey)

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, error: UserError) -> None:
        """Add the problems of an error."""
        for problem in error.problems:
            self._found.setdefault((problem.field, repr(problem.value), problem.message), problem)

    def error(self) -> UserError:
        """Return what was found, at least one problem: one as it is, several as one error."""
        found = list(self._found.values())
        return found[0] if len(found) == 1 else UserErrors(found)

    def raise_any(self) -> None:
        """Raise what was found.

        Raises:
            UserError: if there is any problem.
        """
        if self:
            raise self.error()


def gathered(check: Callable[P, Iterator[UserError]]) -> Callable[P, None]:
    """Make a generator of problems a function that raises all of them together."""

    @wraps(check)
    def raising(*args: P.args, **kwargs: P.kwargs) -> None:
        problems = Problems()
        with problems:
            for problem in check(*args, **kwargs):
                problems.add(problem)
        problems.raise_any()

    return raising
