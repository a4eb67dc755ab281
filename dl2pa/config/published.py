"""Published results (configs/published.yaml), each with the configuration that reproduces it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError, model_validator

from dl2pa.config.identity import Length, relative_length, run_identity
from dl2pa.config.load import load_config, read_yaml
from dl2pa.config.schema import Config
from dl2pa.config.section import PositiveInt, Section
from dl2pa.errors import UserError

Column = int | float | str


@dataclass(frozen=True)
class Cell:
    """One published result.

    Attributes:
        table, row, column: its position; the row is the name of the method.
        top1: accuracy in percent, of the best epoch on the test set.
        config: the configuration file.
        overrides: `key=value` overrides of it.
        needs: additional keys that the user must set.
        suspect: reason why the number is not reliable; None if it is.
    """

    table: str
    row: str
    column: Column
    top1: float
    config: Path
    overrides: tuple[str, ...]
    needs: tuple[str, ...]
    suspect: str | None

    def load(self, overrides: Sequence[str] = ()) -> Config:
        """Configuration of the cell, with additional overrides."""
        return load_config(self.config, [*self.overrides, *overrides])


class Suspect(Section):
    """Columns in which all results are suspect."""

    columns: tuple[Column, ...]
    why: str


class Row(Section):
    """Results of a method, one per column, and their configuration; see ``Cell``.

    Attributes:
        venue: publication of the method, if the table names it.
        note: remark on the comparison.
    """

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
        column: meaning of the columns.
        num_validated: size of the validation set; runs validated on another number of images are not compared.
    """

    title: str
    column: Literal["d", "imbalance", "backbone"]
    columns: tuple[Column, ...]
    num_validated: PositiveInt | None = None
    rows: dict[str, Row]
    suspect: Suspect | None = None

    @model_validator(mode="after")
    def _check_columns(self) -> Table:
        for name, row in self.rows.items():
            if len(row.top1) != len(self.columns):
                raise ValueError(f"row {name} has {len(row.top1)} values for {len(self.columns)} columns")
        unknown = set(self.suspect.columns if self.suspect else ()) - set(self.columns)
        if unknown:
            raise ValueError(f"suspect names unknown columns: {sorted(unknown, key=str)}")
        return self


class Published(Section):
    """Tables by name; `source` is the publication."""

    source: str
    tables: dict[str, Table]


def published_file(path: Path | None = None) -> Path:
    """File of the published tables: `path`, or that of the current folder, or that of the installation."""
    here = Path("configs/published.yaml")
    return path or (here if here.is_file() else Path(__file__).resolve().parents[2] / here)


def load_published(path: Path) -> tuple[Published, tuple[Cell, ...]]:
    """Read the tables and their cells, in the order of the file.

    Args:
        path: published.yaml; paths of configurations are relative to its folder.

    Raises:
        UserError: the file is missing or invalid.
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
    assert top1 is not None, "empty cells are skipped"
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
        suspect="; ".join(reason for reason in reasons if reason) or None,
    )
