"""Files that a report of one run writes into its run directory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dl2pa.osutil import replacing, write_atomically
from dl2pa.rundir import RunDirectory

log = logging.getLogger(__name__)


class Artifacts:
    """Writes artifacts one by one; a failure leaves that artifact out and logs a warning.

    Attributes:
        made: files with their folder among the artifacts of the run.
        pictures: PNG by name.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.made: list[tuple[Path, str]] = []
        self.pictures: dict[str, bytes] = {}
        self._run = run

    def picture(self, name: str, draw: Callable[[], bytes | None]) -> None:
        """Write one PNG to the pictures folder; None draws nothing."""

        def write() -> None:
            png = draw()
            if png is not None:
                path = self._run.picture(name)
                path.parent.mkdir(exist_ok=True)
                with replacing(path) as temporary:
                    temporary.write_bytes(png)
                self.pictures[name] = png
                self.made.append((path, path.parent.name))

        self.attempt(name, write)

    def text(self, path: Path, compose: Callable[[], str]) -> None:
        """Write one text file of the run directory."""

        def write() -> None:
            write_atomically(path, compose())
            self.made.append((path, ""))

        self.attempt(path.name, write)

    def attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """Return the value of the action, or None if it fails."""
        try:
            return action()
        except Exception as error:
            log.warning("could not create %s (%s: %s); the run continues", name, type(error).__name__, error)
            return None
