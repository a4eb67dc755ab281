"""Runs for cells of the published tables."""

from __future__ import annotations

from collections.abc import Sequence

from dl2pa.commands.expand import Element, check_count, expand
from dl2pa.config.published import Cell
from dl2pa.errors import UserError


def select(cells: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """Select the cells named TABLE, TABLE:ROW or TABLE:ROW:COLUMN, in the order of the tables, each once.

    Raises:
        UserError: no cell has the name; the remedy lists the valid ones.
    """
    selected: set[Cell] = set()
    for text in names:
        parts, left = text.split(":"), list(cells)
        if len(parts) > 3:
            raise UserError("--published", text, "has too many parts", "Write TABLE[:ROW[:COLUMN]].")
        for part, field in zip(parts, ("table", "row", "column"), strict=False):
            known = list(dict.fromkeys(str(getattr(cell, field)) for cell in left))
            left = [cell for cell in left if _same(part, getattr(cell, field))]
            if not left:
                remedy = f"Valid: {', '.join(known)}."
                raise UserError("--published", text, f"no published figure has the {field} {part!r}", remedy)
        selected.update(left)
    return [cell for cell in cells if cell in selected]


def expand_cells(cells: Sequence[Cell], overrides: Sequence[str], sweeps: Sequence[str]) -> list[Element]:
    """Expand the cells to runs, with all combinations of the swept values.

    A key that only some cells need, for example word vectors, is set for these cells only: it would change the
    configuration of the others.

    Raises:
        UserError: a cell needs a key that is not set, or there are too many runs.
    """
    special = {key for cell in cells for key in cell.needs}
    keys = {text.partition("=")[0] for text in [*overrides, *sweeps]}
    runs: list[Element] = []
    for cell in cells:
        name = f"{cell.table}:{cell.row}:{cell.column}"
        for key in cell.needs:
            if key not in keys:
                remedy = f"Set {key}=… or select other cells."
                raise UserError(key, None, f"is required by the cell {name}", remedy)
        common = [text for text in overrides if _applies(text, cell, special)]
        axes = [text for text in sweeps if _applies(text, cell, special)]
        for element in expand(cell.config, [*cell.overrides, *common], axes):
            runs.append(Element(element.config, element.overrides, (name, *element.swept)))
        check_count(len(runs))
    return runs


def _applies(text: str, cell: Cell, special: set[str]) -> bool:
    key = text.partition("=")[0]
    return key not in special or key in cell.needs


def _same(text: str, value: str | int | float) -> bool:
    """Whether text names the value; numbers are compared as numbers, 0.010 is 0.01."""
    if isinstance(value, str):
        return text == value
    try:
        return float(text) == float(value)
    except ValueError:
        return False
