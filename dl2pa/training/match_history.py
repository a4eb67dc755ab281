"""Assignment updates of a run: `matchings.jsonl`, one JSON object per line, ordered by step."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dl2pa import fence
from dl2pa.assignment import Matching
from dl2pa.osutil import describing_full_disk, reason_of, write_atomically

log = logging.getLogger(__name__)


class MatchHistory:
    """The file, written by rank 0. Failing to write it only logs one warning.

    A resumed run repeats steps: records after its checkpoint are removed, and a step that is recorded again
    replaces the earlier record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: int | None = None
        self._warned = False

    def add(self, step: int, epoch: float, matching: Matching) -> None:
        """Record the update after `step` steps, at the fractional epoch `epoch`."""
        if self._last is None or self._last >= step:
            self.cut_after(step - 1)
        fields = asdict(matching)
        diagnostics = fields.pop("diagnostics") or {}
        record: dict[str, Any] = {"step": step, "epoch": round(epoch, 6), **fields, **diagnostics}
        if matching.solution is not None:
            record["gap"] = matching.solution.gap
        # Times and solver work are metrics: the file contains only what is reproducible.
        for name in ("solution", "seconds"):
            del record[name]
        if record["prototypes_stayed"] is None:
            del record["prototypes_stayed"]
        record["moves"] = record.pop("moves")  # the longest field last
        line = json.dumps(record) + "\n"
        fence.check(self.path)
        self._last = step
        try:
            with (
                describing_full_disk(self.path.parent, len(line)),
                self.path.open("a", encoding="utf-8") as file,
            ):
                file.write(line)
        except OSError as error:
            self._last = None  # the next update removes what was written of this line
            self._warn(error)

    def cut_after(self, step: int) -> None:
        """Remove the records of later steps and lines that cannot be read."""
        kept = [record for record in self.records() if record["step"] <= step]
        self._last = kept[-1]["step"] if kept else -1
        try:
            if self.path.exists():
                write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        except OSError as error:
            self._warn(error)

    def records(self) -> list[dict[str, Any]]:
        """Read the records; lines that cannot be read are skipped."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        records: list[dict[str, Any]] = []
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
        return records

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            log.warning(
                "%s cannot be written (%s): assignment updates are not recorded there",
                self.path,
                reason_of(error),
            )
        self._warned = True
