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
        identity: recipe of the figure; None if this version cannot run it.
        missing: why this version cannot run the configuration; None if it can.
        entries: full runs first.
    """

    cell: Cell
    identity: Identity | None
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
    related: tuple[Group, ...]

    @property
    def entries(self) -> list[Entry]:
        return [entry for line in self.lines for entry in line.entries]


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
        matched = [entry.group for table in self.tables for entry in table.entries]
        return list(dict.fromkeys([*matched, *(other.group for other in self.others)]))


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
    remarks: dict[Group, str] = {}
    tables: list[ComparedTable] = []
    for name, table in content.tables.items():
        lines = tuple(_line(cell, table, groups, remarks) for cell in cells if cell.table == name)
        matched = {entry.group for line in lines for entry in line.entries}
        related = tuple(g for g in groups if g not in matched and _is_on_the_same_data(g, lines, table))
        tables.append(ComparedTable(name, table, lines, related))
    matched = {entry.group for table in tables for entry in table.entries}
    others = tuple(Other(group, remarks.get(group)) for group in groups if group not in matched)
    return Comparison(content.source, tuple(tables), others, unfinished)


def _is_on_the_same_data(group: Group, lines: Sequence[Line], table: Table) -> bool:
    """Whether the group has the data and the backbone of a cell of the table."""
    cells = (line.identity for line in lines if line.identity is not None)
    same = any(all(group.identity[key] == cell[key] for key in _DATA_KEYS) for cell in cells)
    return same and table.num_validated in (None, group.num_validated)


def _line(cell: Cell, table: Table, groups: Sequence[Group], remarks: dict[Group, str]) -> Line:
    """Find the runs of a cell; add to `remarks` why a group with its recipe is not comparable."""
    try:
        identity = run_identity(cell.load())
    except UserError as error:
        if error.field != "method.name":
            raise
        return Line(cell, None, f"method {error.value} is not available in this version", ())
    entries: list[Entry] = []
    for group in groups:
        length = relative_length(group.identity, group.epochs, identity, cell.needs)
        if length is None:
            continue
        reason = _difference(group, table)
        if reason is None:
            entries.append(Entry(group, length))
        else:
            remarks[group] = f"matches {cell.table} {cell.row} {cell.column} except: {reason}"
    entries.sort(key=lambda e: (_LENGTH_ORDER[e.length], -e.group.steps))
    return Line(cell, identity, None, tuple(entries))


def _difference(group: Group, table: Table) -> str | None:
    """Return why runs with the recipe of a cell are not comparable to it; None if they are."""
    if table.num_validated is not None and group.num_validated != table.num_validated:
        return f"validated on {group.num_validated:,} images instead of {table.num_validated:,}"
    return group.change_remark
