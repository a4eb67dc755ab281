"""Assignment of finished runs to the published figures with the same configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dl2pa.config.identity import Identity, Length, relative_length, run_identity
from dl2pa.config.published import Cell, Table, load_published
from dl2pa.errors import UserError
from dl2pa.reporting.groups import Group, group_runs
from dl2pa.reporting.runs import Run, Unfinished

_LENGTH_ORDER: dict[Length, int] = {"full": 0, "other": 1, "short": 2}
_DATA_KEYS = ("data.dataset", "data.imbalance", "data.num_classes", "model.backbone")


@dataclass(frozen=True)
class Entry:
    """Runs with the configuration of a published figure.

    Attributes:
        length: length of training relative to the published configuration; only `full` runs are comparable.
    """

    group: Group
    length: Length


@dataclass(frozen=True)
class Line:
    """A published figure with its runs.

    Attributes:
        missing: why this version cannot run the configuration; None if it can.
        entries: full runs first.
    """

    cell: Cell
    missing: str | None
    entries: tuple[Entry, ...]

    @property
    def full(self) -> list[Group]:
        return [entry.group for entry in self.entries if entry.length == "full"]


@dataclass(frozen=True)
class ComparedTable:
    """One published table with the runs of each figure.

    Attributes:
        related: runs on the data and backbone of the table that match none of its figures.
    """

    name: str
    table: Table
    lines: tuple[Line, ...]
    related: tuple[Group, ...] = ()

    @property
    def has_runs(self) -> bool:
        return any(line.entries for line in self.lines)


@dataclass(frozen=True)
class Other:
    """Runs that match no published figure; `remark` is the reason if they follow the recipe of one."""

    group: Group
    remark: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Content of a report.

    Attributes:
        source: source of the published figures; None without published tables.
    """

    source: str | None
    tables: tuple[ComparedTable, ...]
    others: tuple[Other, ...]
    unfinished: tuple[Unfinished, ...]

    @property
    def groups(self) -> list[Group]:
        """Every group once."""
        matched = [e.group for t in self.tables for line in t.lines for e in line.entries]
        return list({id(group): group for group in [*matched, *(o.group for o in self.others)]}.values())


def compare(runs: Sequence[Run | Unfinished], published: Path | None) -> Comparison:
    """Group the runs and assign each group to the published figures with its configuration.

    Args:
        published: file of the published tables; None compares the runs only.

    Raises:
        UserError: the file or a configuration that it names is missing or invalid.
    """
    groups = group_runs(run for run in runs if isinstance(run, Run))
    unfinished = tuple(run for run in runs if isinstance(run, Unfinished))
    if published is None:
        return Comparison(None, (), tuple(Other(group) for group in groups), unfinished)
    content, cells = load_published(published)
    matched: set[int] = set()
    remarks: dict[int, str] = {}
    tables: list[ComparedTable] = []
    for name, table in content.tables.items():
        recipes = [(cell, *_identity(cell)) for cell in cells if cell.table == name]
        lines: list[Line] = []
        for cell, identity, missing in recipes:
            line, refused = _line(cell, identity, missing, table, groups)
            lines.append(line)
            remarks.update(refused)
        in_table = {id(entry.group) for line in lines for entry in line.entries}
        matched |= in_table
        known = [identity for _, identity, _ in recipes if identity is not None]
        related = (g for g in groups if id(g) not in in_table and _is_on_the_same_data(g, known, table))
        tables.append(ComparedTable(name, table, tuple(lines), tuple(related)))
    others = tuple(Other(group, remarks.get(id(group))) for group in groups if id(group) not in matched)
    return Comparison(content.source, tuple(tables), others, unfinished)


def _is_on_the_same_data(group: Group, cells: Sequence[Identity], table: Table) -> bool:
    """Whether the group has the data and the backbone of a cell of the table."""
    same = any(all(group.identity[key] == cell[key] for key in _DATA_KEYS) for cell in cells)
    return same and table.num_validated in (None, group.num_validated)


def _line(
    cell: Cell, identity: Identity | None, missing: str | None, table: Table, groups: Sequence[Group]
) -> tuple[Line, dict[int, str]]:
    """Return the cell with its runs, and the reason for each group with its recipe that is not comparable."""
    if identity is None:
        return Line(cell, missing, ()), {}
    entries: list[Entry] = []
    refused: dict[int, str] = {}
    for group in groups:
        length = relative_length(group.identity, group.epochs, identity, cell.needs)
        if length is None:
            continue
        reason = _difference(group, table)
        if reason is None:
            entries.append(Entry(group, length))
        else:
            refused[id(group)] = f"matches {cell.table} {cell.row} {cell.column} except: {reason}"
    entries.sort(key=lambda e: (_LENGTH_ORDER[e.length], -e.group.steps))
    return Line(cell, None, tuple(entries)), refused


def _difference(group: Group, table: Table) -> str | None:
    """Return why runs with the recipe of a cell are not comparable to it; None if they are."""
    if table.num_validated is not None and group.num_validated != table.num_validated:
        return f"validated on {group.num_validated:,} images instead of {table.num_validated:,}"
    return group.change_remark


def _identity(cell: Cell) -> tuple[Identity | None, str | None]:
    """Return the recipe of the cell, or the reason why this version cannot run it."""
    try:
        return run_identity(cell.load()), None
    except UserError as error:
        if error.field == "method.name":
            return None, f"method {error.value} is not available in this version"
        raise
