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
from dl2pa.records import check_record, parse_record
from dl2pa.rundir import warn_damaged

log = logging.getLogger(__name__)

_FIELDS = {
    **dict.fromkeys(("step", "moved", "classes_seen"), int),
    **dict.fromkeys(("epoch", "objective_before", "objective_after", "own_cosine", "gap"), float),
    "moves": list,
}


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
        """Read the records; damaged lines are logged and left out."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        records: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            try:
                records.append(_check(parse_record(line)))
            except ValueError as error:
                warn_damaged(self.path, f"line {number}: {error}")
        return records

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            log.warning(
                "%s cannot be written (%s): assignment updates are not recorded there",
                self.path,
                reason_of(error),
            )
        self._warned = True


def _check(record: Any) -> dict[str, Any]:
    """Check a record and its moves (label, old prototype, new prototype).

    Raises:
        ValueError: a missing or wrong value.
    """
    fields = check_record(record, _FIELDS, ["step", "moves"])
    for move in fields["moves"]:
        if not (isinstance(move, list) and len(move) == 3 and all(type(n) is int and n >= 0 for n in move)):
            raise ValueError("a move is not a list of three numbers")
    return fields
