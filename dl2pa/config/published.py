"""The published tables cell by cell, each with the configuration that stands for it (configs/published.yaml)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError, model_validator

from dl2pa.config.identity import Length, relative_length, run_identity
from dl2pa.config.load import load_config, read_yaml
from dl2pa.config.schema import Config, PositiveInt, Section
from dl2pa.errors import UserError

Column = int | float | str


@dataclass(frozen=True)
class Cell:
    """One published figure.

    Attributes:
        table, row, column: where it stands; the row is the method's name.
        top1: accuracy, per cent: the best epoch on the test set, as published.
        config: the configuration file.
        overrides: `key=value` for it.
        needs: keys that the user has to give besides.
        venue: where the row's method was published, where the table says so.
        suspect: why the number cannot be trusted; None where nothing speaks against it.
        note: what else to know when comparing.
    """

    table: str
    row: str
    column: Column
    top1: float
    config: Path
    overrides: tuple[str, ...]
    needs: tuple[str, ...]
    venue: str | None
    suspect: str | None
    note: str | None

    def load(self, overrides: Sequence[str] = ()) -> Config:
        """The cell's configuration, with further overrides."""
        return load_config(self.config, [*self.overrides, *overrides])


class Suspect(Section):
    """Columns whose every figure is suspect."""

    columns: tuple[Column, ...]
    why: str


class Row(Section):
    """A method's figures, one a column, and the configuration of each; see ``Cell``."""

    top1: tuple[float | None, ...]
    config: str
    overrides: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    venue: str | None = None
    suspect: str | None = None
    note: str | None = None


class Table(Section):
    """One published table.

    Attributes:
        column: what the columns are.
        num_validated: images of the whole validation set: a run that saw another number is not of this table.
    """

    title: str
    column: Literal["d", "imbalance", "backbone"]
    columns: tuple[Column, ...]
    num_validated: PositiveInt | None = None
    rows: dict[str, Row]
    suspect: Suspect | None = None

    @model_validator(mode="after")
    def _one_figure_a_column(self) -> Table:
        for name, row in self.rows.items():
            if len(row.top1) != len(self.columns):
                raise ValueError(f"row {name} has {len(row.top1)} figures for {len(self.columns)} columns")
        unknown = set(self.suspect.columns if self.suspect else ()) - set(self.columns)
        if unknown:
            raise ValueError(f"suspect names columns that are not there: {sorted(unknown, key=str)}")
        return self


class Published(Section):
    """The tables by name.

    Attributes:
        source: what they were copied from.
    """

    source: str
    tables: dict[str, Table]


def published_file(given: Path | None = None) -> Path:
    """The file of the published tables: the one given, else this folder's, else the one beside the program."""
    here = Path("configs/published.yaml")
    return given or (here if here.is_file() else Path(__file__).resolve().parents[2] / here)


def load_published(path: Path) -> tuple[Published, tuple[Cell, ...]]:
    """Read the tables and their cells, table by table, row by row.

    Args:
        path: published.yaml; the configurations lie beside it.

    Raises:
        UserError: the file is missing or not of this form.
    """
    try:
        published = Published.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = f"{where}: {first['msg'].removeprefix('Value error, ')}"
        raise UserError("published", str(path), message, "Correct the file.") from None
    cells = [
        _cell(path.parent, table_name, table, row_name, row, position)
        for table_name, table in published.tables.items()
        for row_name, row in table.rows.items()
        for position in range(len(table.columns))
        if row.top1[position] is not None
    ]
    return published, tuple(cells)


@dataclass(frozen=True)
class PublishedMatch:
    """Published result with the recipe of a run.

    Attributes:
        title: of the table.
        length: length of the run relative to the published one.
    """

    cell: Cell
    title: str
    length: Length


def matching_cells(config: Config, epochs: int, num_validated: int) -> list[PublishedMatch]:
    """Published results whose recipe a run follows.

    Args:
        epochs: epochs the run has trained.
        num_validated: images the run was validated on.

    Raises:
        UserError: the file of published tables does not exist.
    """
    published, cells = load_published(published_file())
    identity = run_identity(config, epochs)
    result: list[PublishedMatch] = []
    for cell in cells:
        table = published.tables[cell.table]
        if table.num_validated not in (None, num_validated):
            continue
        try:
            length = relative_length(identity, epochs, run_identity(cell.load()), cell.needs)
        except UserError:  # a method or file that this version does not have
            continue
        if length is not None:
            result.append(PublishedMatch(cell, table.title, length))
    return result


def _cell(folder: Path, table_name: str, table: Table, row_name: str, row: Row, position: int) -> Cell:
    column, top1 = table.columns[position], row.top1[position]
    assert top1 is not None, "cells without a figure are left out"
    reasons = [row.suspect]
    if table.suspect is not None and column in table.suspect.columns:
        reasons.append(table.suspect.why)
    return Cell(
        table=table_name,
        row=row_name,
        column=column,
        top1=top1,
        config=folder / row.config.replace("{column}", str(column)),
        overrides=tuple(text.replace("{column}", str(column)) for text in row.overrides),
        needs=row.needs,
        venue=row.venue,
        suspect="; ".join(reason for reason in reasons if reason) or None,
        note=row.note,
    )
