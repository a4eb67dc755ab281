"""Cells of the published tables as runs."""

from __future__ import annotations

from collections.abc import Sequence

from dl2pa.commands.expand import Element, check_count, expand
from dl2pa.config.published import Cell
from dl2pa.errors import UserError


def select(cells: Sequence[Cell], wanted: Sequence[str]) -> list[Cell]:
    """The cells that TABLE, TABLE:ROW or TABLE:ROW:COLUMN name, in the tables' order, each once.

    Raises:
        UserError: a name that no cell has; the remedy lists those there are.
    """
    found: set[Cell] = set()
    for text in wanted:
        parts, left = text.split(":"), list(cells)
        if len(parts) > 3:
            raise UserError("--cells", text, "has too many parts", "Write TABLE[:ROW[:COLUMN]].")
        for part, field in zip(parts, ("table", "row", "column"), strict=False):
            known = list(dict.fromkeys(str(getattr(cell, field)) for cell in left))
            left = [cell for cell in left if _same(part, getattr(cell, field))]
            if not left:
                remedy = f"Known: {', '.join(known)}."
                raise UserError("--cells", text, f"there is no {field} {part!r} with a figure", remedy)
        found.update(left)
    return [cell for cell in cells if cell in found]


def expand_cells(cells: Sequence[Cell], overrides: Sequence[str], sweeps: Sequence[str]) -> list[Element]:
    """The runs that stand for the cells, times the combinations of the swept values.

    What only some of the cells need (word vectors, for example) goes to those alone: another cell's
    configuration would no longer be its own with it.

    Raises:
        UserError: a cell needs a key that was not given, or there are too many runs.
    """
    special = {key for cell in cells for key in cell.needs}
    given = {text.partition("=")[0] for text in [*overrides, *sweeps]}
    found: list[Element] = []
    for cell in cells:
        name = f"{cell.table}:{cell.row}:{cell.column}"
        for key in cell.needs:
            if key not in given:
                remedy = f"Give {key}=…, or choose other cells."
                raise UserError(key, None, f"the cell {name} needs it", remedy)
        own = [text for text in overrides if _concerns(text, cell, special)]
        axes = [text for text in sweeps if _concerns(text, cell, special)]
        for element in expand(cell.config, [*cell.overrides, *own], axes):
            found.append(Element(element.config, element.overrides, (name, *element.swept)))
        check_count(len(found))
    return found


def _concerns(text: str, cell: Cell, special: set[str]) -> bool:
    key = text.partition("=")[0]
    return key not in special or key in cell.needs


def _same(text: str, value: str | int | float) -> bool:
    """Whether a part of the user's text names the value; 0.010 is 0.01."""
    if isinstance(value, str):
        return text == value
    try:
        return float(text) == float(value)
    except ValueError:
        return False
