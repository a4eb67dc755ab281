"""Verdict of a comparison in one line, and its differences as metrics."""

from __future__ import annotations

from collections.abc import Sequence

from dl2pa.config.identity import group_name
from dl2pa.reporting.compare import Comparison, Line
from dl2pa.reporting.differences import difference_of_means
from dl2pa.reporting.groups import Group


def verdict(comparison: Comparison) -> str:
    """Summarize a comparison: runs above and below published figures, and the best runs on each data set."""
    parts = _published_sentence(comparison)
    sections: dict[tuple[str, int], list[Group]] = {}
    for other in comparison.others:
        sections.setdefault((other.group.data, other.group.num_validated), []).append(other.group)
    parts += [_best_sentence(data, groups) for (data, _), groups in sections.items()]
    return " ".join(parts) or "No finished runs."


def gaps(comparison: Comparison) -> dict[str, float]:
    """Difference from each published figure to the best epoch of its runs of full length, in points, by name.

    If several groups have the configuration of a figure, the best one counts.
    """
    return {
        f"gap/{line.cell.table}/{line.cell.row}/{line.cell.column}": round(_gap(line), 2)
        for line in _full_lines(comparison)
    }


def metrics(comparison: Comparison) -> dict[str, float]:
    """Metrics of the report: the gaps, and mean and standard deviation over seeds of each group by its name.

    Groups whose configuration changed between attempts have no single recipe and are left out.
    """
    values = gaps(comparison)
    for group in comparison.groups:
        if group.changed:
            continue
        name = group_name(group.runs[0].config) + (f" {group.images}" if group.images else "")
        values[f"last_mean/{name}"] = round(group.last.mean, 2)
        if group.last.std is not None:
            values[f"last_std/{name}"] = round(group.last.std, 2)
    return values


def _full_lines(comparison: Comparison) -> list[Line]:
    return [line for table in comparison.tables for line in table.lines if line.full]


def _gap(line: Line) -> float:
    return max(group.best.mean for group in line.full) - line.cell.top1


def _published_sentence(comparison: Comparison) -> list[str]:
    if comparison.source is None:
        return []
    lines = _full_lines(comparison)
    if not lines:
        return ["No run has the configuration and the full length of a published figure."]
    above = sum(_gap(line) >= 0 for line in lines)
    worst = min(lines, key=_gap)
    total = sum(len(table.lines) for table in comparison.tables)
    text = f"{len(lines)} of {total} published figures have runs of full length: {above} reached, "
    text += f"{len(lines) - above} not; lowest difference {_gap(worst):+.2f} points "
    return [f"{text}({worst.cell.table}, {worst.cell.row}, {worst.cell.column})."]


def _best_sentence(data: str, groups: Sequence[Group]) -> str:
    """Name the group with the best mean accuracy at the last epoch and its distance to the second best."""
    first, *rest = sorted(groups, key=lambda group: -group.last.mean)
    text = f"On {data}, {_named(first, groups)} is best with {first.last} % (n = {first.n})"
    if not rest:
        return f"On {data}, {_named(first, groups)} has {first.last} % (n = {first.n})."
    gap, interval = difference_of_means([_last(rest[0]), _last(first)])
    second = f"{_named(rest[0], groups)} with {rest[0].last} % (n = {rest[0].n})"
    if interval is None:
        explained = "with one seed each, seeds may explain it"
    else:
        explained = f"seeds {'may' if interval[0] <= 0 <= interval[1] else 'do not'} explain it"
    return f"{text}, {gap:.2f} points above {second}; {explained}."


def _last(group: Group) -> list[float]:
    return [run.result.top1_last for run in group.runs]


def _named(group: Group, among: Sequence[Group]) -> str:
    """Name a group by method, d and, if these are not unique, assignment and length."""
    same = [g for g in among if (g.method, g.dim) == (group.method, group.dim)]
    name = f"{group.method} (d = {group.dim}"
    if len(same) > 1:
        name += f", {group.identity['method.assignment']}, {group.epochs} epochs"
        name += f", data {group.images}" if group.images else ""
    return f"{name})"
