"""Composition of a comparison as a document: tables, columns, figures and remarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dl2pa.config.identity import Identity, describe
from dl2pa.reporting import report_plots
from dl2pa.reporting.compare import ComparedTable, Comparison, Entry, Line, Other
from dl2pa.reporting.document import Block, Bullets, Grid, Heading, Paragraph, Picture, code
from dl2pa.reporting.groups import Group, Summary
from dl2pa.reporting.runs import Run, Unfinished
from pipelines.longtail import GROUPS

_DASH = "–"
_EXPLANATION = (
    "Accuracies are top-1 in percent on the full validation set: mean ± sample standard deviation over n seeds. "
    "Published figures are the best epoch on the test set and are compared with the best epoch of the runs. The best "
    "epoch is selected on the images it is measured on; the accuracy of the last epoch is unbiased. A mark [s…] gives "
    "the reason why a published figure is suspect."
)


def compose(comparison: Comparison) -> list[Block]:
    """Compose the report."""
    blocks: list[Block] = [Heading(1, "Comparison with published results" if comparison.source else "Runs")]
    if comparison.source is not None:
        blocks += [Paragraph(f"Published: {comparison.source}."), Paragraph(_EXPLANATION)]
    for table in comparison.tables:
        blocks += _table(table)
    if comparison.others:
        blocks += _others(comparison.others, bool(comparison.source))
    blocks += _finished(comparison.groups)
    if comparison.unfinished:
        blocks += _unfinished(comparison.unfinished)
    return blocks


class _Notes:
    """Numbered remarks of a table; equal remarks share a number."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._counts = {"s": 0, "n": 0}

    def mark(self, kind: str, text: str | None) -> str:
        """Return the mark of a remark; kind `s`: reason why a figure is suspect, `n`: any other."""
        if text is None:
            return ""
        key = f"{kind}{text}"
        if key not in self._texts:
            self._counts[kind] += 1
            self._texts[key] = f"{kind}{self._counts[kind]}"
        return f" [{self._texts[key]}]"

    def block(self) -> list[Block]:
        names = {"s": "suspect: ", "n": ""}
        ordered = sorted(self._texts.items(), key=lambda item: (item[1][0] != "s", int(item[1][1:])))
        items = [f"[{mark}] {names[key[0]]}{key[1:]}." for key, mark in ordered]
        return [Bullets(items)] if items else []


def _table(compared: ComparedTable) -> list[Block]:
    table, notes = compared.table, _Notes()
    blocks: list[Block] = [Heading(2, table.title)]
    blocks.append(_overview(compared, notes))
    if compared.has_runs:
        blocks.append(_details(compared, notes))
    blocks += notes.block()
    if compared.related:
        blocks += _all_runs(compared)
    missing = [line for line in compared.lines if line.missing is None and not line.full]
    if missing:
        blocks.append(Paragraph(_command_for(compared, missing)))
    if compared.has_runs:
        blocks += _pictures(compared.name, table.title, table.column, _points(compared))
    return blocks


def _pictures(name: str, title: str, column: str, points: Sequence[report_plots.Point]) -> list[Block]:
    """Plot accuracy over the column, if it is numeric, and by method."""
    over, by = f"{title}: top-1 accuracy over {column}", f"{title}: top-1 accuracy by method"
    lines = report_plots.over_columns(points, column, over)
    pictures: list[Block] = [] if lines is None else [Picture(f"{name}-over-{column}", lines, over)]
    dots = report_plots.by_method(points, column, by)
    return [*pictures, Picture(f"{name}-by-method", dots, by)]


def _frequency_groups(groups: Sequence[Group]) -> list[str]:
    """Head, medium and tail, if any group of runs has them."""
    return [name for name in GROUPS if any(name in group.by_frequency for group in groups)]


def _last_results(group: Group, names: Sequence[str]) -> list[str]:
    """Last accuracy, number of seeds, accuracy of the frequency groups and calibration error."""
    frequencies = [_text(group.by_frequency.get(name)) for name in names]
    return [str(group.last), str(group.n), *frequencies, _text(group.ece)]


def _overview(compared: ComparedTable, notes: _Notes) -> Grid:
    """Compose the table in its published form; rows with full runs are followed by their accuracies."""
    table = compared.table
    heads = ["method ", " ", *(f"{table.column} = {column}" for column in table.columns)]
    rows: list[list[str]] = []
    for name, row in table.rows.items():
        lines = {line.cell.column: line for line in compared.lines if line.cell.row == name}
        method = name + (f" ({row.venue})" if row.venue else "") + notes.mark("n", row.note)
        unknown = next((line.missing for line in lines.values() if line.missing), None)
        rows.append(
            [method + notes.mark("n", unknown), "published"]
            + [_figure(lines.get(column), notes) for column in table.columns]
        )
        if any(line.full for line in lines.values()):
            for title, key in (("best epoch", "best"), ("last epoch", "last")):
                cells = [_measured(lines.get(column), key) for column in table.columns]
                rows.append(["", title, *cells])
    return Grid(heads, rows)


def _figure(line: Line | None, notes: _Notes) -> str:
    return _DASH if line is None else f"{line.cell.top1}{notes.mark('s', line.cell.suspect)}"


def _measured(line: Line | None, key: str) -> str:
    """Accuracies of the full runs of a cell; several if they differ in a setting that the cell leaves open."""
    if line is None or not line.full:
        return _DASH
    return "; ".join(f"{getattr(group, key)} (n = {group.n})" for group in line.full)


def _details(compared: ComparedTable, notes: _Notes) -> Grid:
    """Compose one line per group of runs of a published figure."""
    table = compared.table
    groups = [entry.group for line in compared.lines for entry in line.entries]
    tail = _frequency_groups(groups)
    d = [] if table.column == "d" else ["d"]
    heads = ["method ", table.column, *d, "published", "best", "difference", "last", "n", *tail]
    heads += ["ECE", "steps", "length ", "recipe "]
    rows: list[list[str]] = []
    for line in compared.lines:
        for entry in line.entries:
            group = entry.group
            published = f"{line.cell.top1}{notes.mark('s', line.cell.suspect)}"
            gap = f"{group.best.mean - line.cell.top1:+.2f}" if entry.length == "full" else _DASH
            same_cell = [other.group.identity for other in line.entries]
            name = [line.cell.row, str(line.cell.column), *([str(group.dim)] if d else [])]
            results = [published, str(group.best), gap, *_last_results(group, tail)]
            recipe = describe(group.identity, beside=same_cell)
            rows.append([*name, *results, f"{group.steps:,}", _length(entry), recipe])
    return Grid(heads, rows)


def _all_runs(compared: ComparedTable) -> list[Block]:
    """Compose a table of all groups on the data of the table, ordered by column, length and accuracy."""
    column = compared.table.column
    entries = [entry for line in compared.lines for entry in line.entries]
    runs = [(entry.group, _length(entry)) for entry in {id(e.group): e for e in entries}.values()]
    runs += [(group, _completed(group)) for group in compared.related]
    groups = [group for group, _ in runs]
    tail = _frequency_groups(groups)
    d = [] if column == "d" else ["d"]
    heads = [column, *d, "method ", "best", "last", "n", *tail, "ECE", "epochs", "length ", "recipe "]
    runs.sort(key=lambda run: (_sortable(_column_of(run[0], column)), -run[0].epochs, -run[0].best.mean))
    rows = [
        [
            *(str(_column_of(group, column)), *([str(group.dim)] if d else []), group.method),
            *(str(group.best), *_last_results(group, tail), str(group.epochs), length),
            describe(group.identity, beside=_of_method(group, groups)),
        ]
        for group, length in runs
    ]
    return [
        Paragraph("All runs on this data, including those without a published figure:"),
        Grid(heads, rows),
    ]


def _of_method(group: Group, groups: Iterable[Group]) -> list[Identity]:
    """Recipes of the same method and dimension."""
    return [g.identity for g in groups if (g.method, g.dim) == (group.method, group.dim)]


def _column_of(group: Group, column: str) -> int | float | str:
    keys = {"d": "model.embedding_dim", "imbalance": "data.imbalance", "backbone": "model.backbone"}
    return group.identity[keys[column]]


def _sortable(value: float | str) -> tuple[float, str]:
    return (0.0, value) if isinstance(value, str) else (float(value), "")


def _completed(group: Group) -> str:
    return (
        f"CUT after {group.epochs} of {group.identity['train.epochs']} epochs" if group.is_cut else "complete"
    )


def _length(entry: Entry) -> str:
    """Length of training relative to the published configuration; deviations in upper case."""
    group = entry.group
    if entry.length == "full":
        return "full"
    done = f"{group.steps:,} steps, {group.epochs} epochs done"
    return f"SHORT: {done}" if entry.length == "short" else f"OTHER LENGTH: {done}"


def _command_for(compared: ComparedTable, missing: Sequence[Line]) -> str:
    names = list(dict.fromkeys(line.cell.row for line in missing))
    every = len(names) == len(compared.table.rows)
    cells = (
        f"--published {compared.name}"
        if every
        else " ".join(f"--published {compared.name}:{name}" for name in names)
    )
    needs = sorted({key for line in missing for key in line.cell.needs})
    rest = " ".join([*(f"{key}=FILE" for key in needs), "data.root=DIR"])
    count = len(missing)
    figures = "1 figure has" if count == 1 else f"{count} figures have"
    return f"{figures} no full run yet: {code(f'dl2pa sweep {cells} --seeds 0..2 {rest}')}"


def _points(compared: ComparedTable) -> list[report_plots.Point]:
    points: list[report_plots.Point] = []
    for line in compared.lines:
        cell = line.cell
        kind = "suspect" if cell.suspect else "published"
        points.append(report_plots.Point(cell.row, cell.row, cell.column, cell.top1, None, kind))
        for entry in line.entries:
            best = entry.group.best
            kind = "ours" if entry.length == "full" else "short"
            points.append(report_plots.Point(cell.row, cell.row, cell.column, best.mean, best.std, kind))
    return points


def _others(others: Sequence[Other], with_heading: bool) -> list[Block]:
    """Compose one table per data set of the runs without a published figure."""
    blocks: list[Block] = []
    if with_heading:
        blocks.append(Heading(2, "Runs without a published figure"))
    sections: dict[str, list[Other]] = {}
    for other in others:
        sections.setdefault(other.group.data, []).append(other)
    for title, section in sections.items():
        blocks += [Heading(3, title), *_section(section)]
        blocks += _section_pictures(title, [other.group for other in section])
    return blocks


def _section(section: Sequence[Other]) -> list[Block]:
    groups, notes = [other.group for other in section], _Notes()
    tail = _frequency_groups(groups)
    heads = ["method ", "network ", "d", "best", "last", "n", *tail, "ECE", "steps", "length ", "recipe "]
    rows: list[list[str]] = []
    for other in section:
        group = other.group
        rows.append(
            [
                group.method + notes.mark("n", other.remark or group.change_remark),
                *(str(group.identity["model.backbone"]), str(group.dim), str(group.best)),
                *(*_last_results(group, tail), f"{group.steps:,}", _completed(group)),
                describe(group.identity, beside=_of_method(group, groups)),
            ]
        )
    return [Grid(heads, rows), *notes.block()]


def _section_pictures(title: str, groups: Sequence[Group]) -> list[Block]:
    counts: dict[tuple[str, int], int] = {}
    points: list[report_plots.Point] = []
    for group in groups:
        counts[group.method, group.dim] = number = counts.get((group.method, group.dim), 0) + 1
        label = group.method if number == 1 else f"{group.method} ({number})"
        kind = "short" if group.is_cut else "ours"
        points.append(
            report_plots.Point(group.method, label, group.dim, group.best.mean, group.best.std, kind)
        )
    name = "".join(c if c.isalnum() else "-" for c in title)
    return _pictures(f"runs-{name}", title, "d", points)


def _finished(groups: Iterable[Group]) -> list[Block]:
    """Compose a table of the individual runs."""
    heads = ["run ", "method ", "d", "seed", "best", "last", "steps", "processes", "device ", "code ", " "]
    rows: list[list[str]] = []
    for group in groups:
        rows += [_run_row(run, group, "") for run in group.runs]
        rows += [_run_row(run, group, f"repeat of seed {run.seed}: not counted") for run in group.repeats]
    if not rows:
        return [Paragraph("No finished runs.")]
    return [Heading(2, "Finished runs"), Grid(heads, rows)]


def _run_row(run: Run, group: Group, remark: str) -> list[str]:
    result, environment = run.result, run.environment
    commit = str(environment.get("git_commit") or environment.get("dl2pa") or "unknown")[:10]
    if environment.get("git_dirty"):
        commit += ", changed"
    accuracies = [f"{result.top1_best:.2f}", f"{result.top1_last:.2f}"]
    name = [code(run.path), group.method, str(group.dim), str(run.seed)]
    return [
        *name,
        *accuracies,
        f"{result.steps:,}",
        str(result.world_size),
        str(environment.get("device") or "unknown"),
        commit,
        remark,
    ]


def _unfinished(unfinished: Sequence[Unfinished]) -> list[Block]:
    rows = [[code(run.path), run.state, run.reason] for run in unfinished]
    remark = Paragraph("These runs are not included in the tables above.")
    return [Heading(2, "Unfinished runs"), remark, Grid(["run ", "state ", " "], rows)]


def _text(summary: Summary | None) -> str:
    return _DASH if summary is None else str(summary)
