"""The published tables with finished runs beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dl2pa.config.identity import Identity, Length, identity_of, length_beside
from dl2pa.config.published import Cell, Table, load_published
from dl2pa.errors import UserError
from dl2pa.reporting.groups import Group, group_runs
from dl2pa.reporting.runs import Run, Unfinished


@dataclass(frozen=True)
class Entry:
    """Runs that stand beside a published figure.

    Attributes:
        length: how long they are beside the cell's own configuration; only `full` ones are its equals.
    """

    group: Group
    length: Length


@dataclass(frozen=True)
class Line:
    """A published figure and ours.

    Attributes:
        missing: why this version cannot run the cell; None where it can.
        entries: full ones first.
    """

    cell: Cell
    missing: str | None
    entries: tuple[Entry, ...]

    @property
    def full(self) -> list[Group]:
        return [entry.group for entry in self.entries if entry.length == "full"]


@dataclass(frozen=True)
class Compared:
    """One published table, a line a figure.

    Attributes:
        beside: runs of no cell on the table's data and network: other methods, dimensions and recipes.
    """

    name: str
    table: Table
    lines: tuple[Line, ...]
    beside: tuple[Group, ...] = ()

    @property
    def has_runs(self) -> bool:
        return any(line.entries for line in self.lines)


@dataclass(frozen=True)
class Other:
    """Runs that stand beside no published figure; `remark` says what kept them from one."""

    group: Group
    remark: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Everything a report shows.

    Attributes:
        source: of the published figures; None where none were asked for.
    """

    source: str | None
    tables: tuple[Compared, ...]
    others: tuple[Other, ...]
    unfinished: tuple[Unfinished, ...]

    @property
    def groups(self) -> list[Group]:
        """Every group once."""
        beside = [e.group for t in self.tables for line in t.lines for e in line.entries]
        found = {id(group): group for group in [*beside, *(other.group for other in self.others)]}
        return list(found.values())


def compare(found: Sequence[Run | Unfinished], published: Path | None) -> Comparison:
    """Put each group of runs beside every published figure whose configuration is its own.

    Args:
        published: file of the published tables; None for the runs alone.

    Raises:
        UserError: that file, or a configuration it names, is missing or wrong.
    """
    groups = group_runs(run for run in found if isinstance(run, Run))
    unfinished = tuple(run for run in found if isinstance(run, Unfinished))
    if published is None:
        return Comparison(None, (), tuple(Other(group) for group in groups), unfinished)
    described, cells = load_published(published)
    placed: set[int] = set()
    remarks: dict[int, str] = {}
    tables: list[Compared] = []
    for name, table in described.tables.items():
        recipes = [(cell, *_identity(cell)) for cell in cells if cell.table == name]
        lines: list[Line] = []
        for cell, identity, missing in recipes:
            line, refused = _line(cell, identity, missing, table, groups)
            lines.append(line)
            placed.update(id(entry.group) for entry in line.entries)
            remarks.update(refused)
        own = {id(entry.group) for line in lines for entry in line.entries}
        known = [identity for _, identity, _ in recipes if identity is not None]
        beside = (g for g in groups if id(g) not in own and _is_on_the_same_data(g, known, table))
        tables.append(Compared(name, table, tuple(lines), tuple(beside)))
    others = tuple(Other(group, remarks.get(id(group))) for group in groups if id(group) not in placed)
    return Comparison(described.source, tuple(tables), others, unfinished)


def _is_on_the_same_data(group: Group, cells: Sequence[Identity], table: Table) -> bool:
    """Whether the runs saw the data of some cell of the table, with its network."""
    keys = ("data.dataset", "data.imbalance", "data.num_classes", "model.backbone")
    seen = [group.identity[key] for key in keys]
    same = any(seen == [cell[key] for key in keys] for cell in cells)
    return same and table.num_validated in (None, group.num_validated)


def _line(
    cell: Cell, identity: Identity | None, missing: str | None, table: Table, groups: Sequence[Group]
) -> tuple[Line, dict[int, str]]:
    """The cell with its runs, and why some that follow its recipe are not among them."""
    if identity is None:
        return Line(cell, missing, ()), {}
    entries: list[Entry] = []
    refused: dict[int, str] = {}
    for group in groups:
        length = length_beside(group.identity, group.epochs, identity, cell.needs)
        if length is None:
            continue
        reason = _not_the_cells(group, table)
        if reason is None:
            entries.append(Entry(group, length))
        else:
            refused[id(group)] = f"{cell.table} {cell.row} {cell.column} but for this: {reason}"
    order = {"full": 0, "other": 1, "short": 2}
    return Line(cell, None, tuple(sorted(entries, key=lambda e: (order[e.length], -e.group.steps)))), refused


def _not_the_cells(group: Group, table: Table) -> str | None:
    if table.num_validated is not None and group.num_validated != table.num_validated:
        return f"validated on {group.num_validated:,} images instead of {table.num_validated:,}"
    if group.changed:
        return f"{', '.join(group.changed)} changed midway"
    return None


def _identity(cell: Cell) -> tuple[Identity | None, str | None]:
    """The cell's recipe; a method that this version does not have leaves the figure without one."""
    try:
        return identity_of(cell.load()), None
    except UserError as error:
        if error.field == "method.name":
            return None, f"this version has no method {error.value}"
        raise
