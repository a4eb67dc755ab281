"""What a check says."""

from __future__ import annotations

import sys
import time
from typing import NoReturn


class CheckFailed(AssertionError):
    """What the image promises and does not hold."""


def check(condition: object, what: str) -> None:
    """Fail unless the condition is true."""
    if not condition:
        raise CheckFailed(what)


def say(what: str, seen: str = "") -> None:
    """One line of the report."""
    print(f"{time.strftime('%H:%M:%S')}  {what:<40} {seen}".rstrip(), flush=True)


def give_up(why: str) -> NoReturn:
    """This machine cannot do it, which is nobody's fault."""
    print(f"build-test: {why}", file=sys.stderr)
    raise SystemExit(3)
