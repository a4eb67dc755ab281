"""Runs that reproduce published results."""

from __future__ import annotations

from collections.abc import Sequence

from dl2pa.config import flat_overrides
from dl2pa.config.published import Cell
from dl2pa.errors import UserError
from dl2pa.runplan import RunSpec, check_count, expand


def select_results(results: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """Return the results named TABLE, TABLE:ROW or TABLE:ROW:COLUMN, each once, in table order.

    Raises:
        UserError: a name matches no result; the remedy lists the known names.
    """
    selected: set[Cell] = set()
    for text in names:
        parts, candidates = text.split(":"), list(results)
        if len(parts) > 3:
            raise UserError("--published", text, "has too many parts", "Write TABLE[:ROW[:COLUMN]].")
        for part, field in zip(parts, ("table", "row", "column"), strict=False):
            known = list(dict.fromkeys(str(getattr(result, field)) for result in candidates))
            candidates = [result for result in candidates if _matches(part, getattr(result, field))]
            if not candidates:
                remedy = f"Known: {', '.join(known)}."
                raise UserError("--published", text, f"there is no {field} {part!r} with a result", remedy)
        selected.update(candidates)
    return [result for result in results if result in selected]


def expand_results(results: Sequence[Cell], overrides: Sequence[str], grid: Sequence[str]) -> list[RunSpec]:
    """Return the runs of each result's configuration, one per combination of the grid values.

    A key that only some results need (for example word vectors) is passed only to those.

    Raises:
        UserError: a required key is missing, or there are too many runs.
    """
    special = {key for result in results for key in result.needs}
    present = {*flat_overrides(overrides), *(text.partition("=")[0] for text in grid)}
    specs: list[RunSpec] = []
    for result in results:
        name = f"{result.table}:{result.row}:{result.column}"
        for key in result.needs:
            if key not in present:
                remedy = f"Give {key}=…, or choose other results."
                raise UserError(key, None, f"is required for {name}", remedy)
        common = [text for text in overrides if _applies(text, result, special)]
        axes = [text for text in grid if _applies(text, result, special)]
        for spec in expand(result.config, [*result.overrides, *common], axes):
            specs.append(RunSpec(spec.config_file, spec.overrides, (name, *spec.varied)))
        check_count(len(specs))
    return specs


def _applies(text: str, result: Cell, special: set[str]) -> bool:
    key = text.partition("=")[0]
    return key not in special or key in result.needs


def _matches(text: str, value: str | int | float) -> bool:
    """Compare one part of a name with a table value; numbers compare by value."""
    if isinstance(value, str):
        return text == value
    try:
        return float(text) == float(value)
    except ValueError:
        return False
