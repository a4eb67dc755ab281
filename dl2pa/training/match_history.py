"""Every matching of a run in its directory: `matchings.jsonl`, one JSON object a line, in the order of the steps."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dl2pa.assignment import Matching
from dl2pa.osutil import write_atomically

log = logging.getLogger(__name__)


class MatchHistory:
    """The file, written by rank 0. A disk that refuses it is said once and costs no run.

    A run that was killed repeats steps: what lies beyond the checkpoint it resumes from is cut off, and a step
    recorded again replaces its first record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: int | None = None
        self._refused = False

    def add(self, step: int, epoch: float, matching: Matching) -> None:
        """Record the matching after `step` steps, `epoch` epochs (a fraction) into the run."""
        if self._last is None or self._last >= step:
            self.cut_after(step - 1)
        found = asdict(matching)
        record: dict[str, Any] = {
            "step": step,
            "epoch": round(epoch, 6),
            **found,
            **(found["diagnostics"] or {}),
        }
        if matching.solution is not None:
            record["gap"] = matching.solution.gap
        # What depends on the clock and on earlier solves is among the metrics; the rest is reproducible.
        for name in ("diagnostics", "solution", "seconds"):
            del record[name]
        if record["prototypes_stayed"] is None:
            del record["prototypes_stayed"]
        record["moves"] = record.pop("moves")  # the long one last
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            self._refuse(error)
        self._last = step

    def cut_after(self, step: int) -> None:
        """Drop the records of later steps, and a line torn by a kill."""
        kept = [record for record in self.records() if record["step"] <= step]
        self._last = kept[-1]["step"] if kept else -1
        try:
            if self.path.exists():
                write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        except OSError as error:
            self._refuse(error)

    def records(self) -> list[dict[str, Any]]:
        """What is recorded so far; lines that cannot be read are left out."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        found: list[dict[str, Any]] = []
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                found.append(record)
        return found

    def _refuse(self, error: OSError) -> None:
        if not self._refused:
            log.warning("%s cannot be written (%s): matchings go unrecorded", self.path, error.strerror)
        self._refused = True
