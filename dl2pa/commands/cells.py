"""Runs of the configurations behind published results."""

from __future__ import annotations

from collections.abc import Sequence

from dl2pa.config.published import Cell
from dl2pa.errors import UserError
from dl2pa.runplan import RunSpec, check_count, expand


def select(cells: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """Return the results that TABLE, TABLE:ROW or TABLE:ROW:COLUMN name, in table order, each once.

    Raises:
        UserError: a name without a result; the remedy lists the known names.
    """
    selected: set[Cell] = set()
    for text in names:
        parts, candidates = text.split(":"), list(cells)
        if len(parts) > 3:
            raise UserError("--published", text, "has too many parts", "Write TABLE[:ROW[:COLUMN]].")
        for part, field in zip(parts, ("table", "row", "column"), strict=False):
            known = list(dict.fromkeys(str(getattr(cell, field)) for cell in candidates))
            candidates = [cell for cell in candidates if _matches(part, getattr(cell, field))]
            if not candidates:
                remedy = f"Known: {', '.join(known)}."
                raise UserError("--published", text, f"there is no {field} {part!r} with a result", remedy)
        selected.update(candidates)
    return [cell for cell in cells if cell in selected]


def expand_cells(cells: Sequence[Cell], overrides: Sequence[str], grid: Sequence[str]) -> list[RunSpec]:
    """Return the runs of each result's configuration, one per combination of the grid values.

    A key that only some results need (for example word vectors) is passed to those only, because it would change the
    configuration of the others.

    Raises:
        UserError: a result needs a key that is missing, or there are too many runs.
    """
    special = {key for cell in cells for key in cell.needs}
    present = {text.partition("=")[0] for text in [*overrides, *grid]}
    specs: list[RunSpec] = []
    for cell in cells:
        name = f"{cell.table}:{cell.row}:{cell.column}"
        for key in cell.needs:
            if key not in present:
                remedy = f"Give {key}=…, or choose other results."
                raise UserError(key, None, f"is required for {name}", remedy)
        common = [text for text in overrides if _applies(text, cell, special)]
        axes = [text for text in grid if _applies(text, cell, special)]
        for spec in expand(cell.config, [*cell.overrides, *common], axes):
            specs.append(RunSpec(spec.config_file, spec.overrides, (name, *spec.varied)))
        check_count(len(specs))
    return specs


def _applies(text: str, cell: Cell, special: set[str]) -> bool:
    key = text.partition("=")[0]
    return key not in special or key in cell.needs


def _matches(text: str, value: str | int | float) -> bool:
    """Compare one part of a name with a table value; numbers compare by value."""
    if isinstance(value, str):
        return text == value
    try:
        return float(text) == float(value)
    except ValueError:
        return False
