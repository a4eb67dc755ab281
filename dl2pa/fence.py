"""Fences: a process that has lost its run directory to another one writes nothing more into it and ends.

A suspended process, or one on a node that lost its network, can continue after another process has taken over its
run. Every write to a run directory goes through `check`, which compares the owner record with this process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from dl2pa.errors import EXIT_FAILURE


class Claim(Protocol):
    """The right of this process to write a folder."""

    def is_lost(self, *, fresh: bool) -> bool:
        """Whether another process owns the folder now; a result of the last second is reused unless `fresh`."""
        ...

    def describe_loss(self) -> str:
        """Message about the new owner; empty if another process of the same run prints it."""
        ...


_claims: dict[Path, Claim] = {}
_exit: Callable[[int], None] = os._exit


def guard(folder: Path, claim: Claim) -> None:
    """Check the claim before every write below the folder."""
    _claims[folder.absolute()] = claim


def unguard(folder: Path) -> None:
    """End the checks of `guard`."""
    _claims.pop(folder.absolute(), None)


def check(path: Path, *, fresh: bool = True) -> None:
    """End this process if `path` is in a folder that now belongs to another process.

    Args:
        fresh: read the owner record even if it was read within the last second.
    """
    if not _claims:
        return
    path = path.absolute()
    for folder, claim in list(_claims.items()):
        if path.is_relative_to(folder) and claim.is_lost(fresh=fresh):
            _leave(claim.describe_loss())


def _leave(message: str) -> None:
    """End the process at once: cleaning up would write to the folder of the new owner."""
    if message:
        os.write(2, f"dl2pa: {message}\n".encode())
        if "--json" in sys.argv:
            error = {"field": None, "value": None, "message": message, "remedy": None}
            os.write(1, json.dumps({"error": error}).encode() + b"\n")
    _exit(EXIT_FAILURE)
