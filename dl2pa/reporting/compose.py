"""Composition of a comparison as a document: tables, columns, figures and remarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from dl2pa.config.identity import Identity, describe
from dl2pa.reporting import report_plots
from dl2pa.reporting.compare import ComparedTable, Comparison, Entry, Line, Other
from dl2pa.reporting.document import Block, Bullets, Folded, Grid, Heading, Paragraph, Picture, code, grid
from dl2pa.reporting.groups import Group, Summary
from dl2pa.reporting.runs import Run, Unfinished
from dl2pa.reporting.verdict import verdict
from dl2pa.terms import term
from pipelines.longtail import GROUPS

Columns = dict[str, Callable[[Group], str]]

_DASH = "–"
_EXPLANATION = (
    "Accuracies are top-1 in percent on the full validation set: mean ± sample standard deviation over n seeds. "
    "Published figures are the best epoch on the test set and are compared with the best epoch of the runs. The best "
    "epoch is selected on the images it is measured on; the accuracy of the last epoch is unbiased. A mark [s…] gives "
    "the reason why a published figure is suspect."
)


def compose(comparison: Comparison) -> list[Block]:
    """Compose the report: a verdict, the tables with runs, the runs, and the published tables without a run."""
    blocks: list[Block] = [Heading(1, "Comparison with published results" if comparison.source else "Runs")]
    blocks.append(Paragraph(verdict(comparison), is_lead=True))
    for table in comparison.tables:
        if table.entries:
            blocks += [Heading(2, table.table.title), *_table(table)]
    if comparison.others:
        blocks += _others(comparison.others, bool(comparison.source))
    blocks += _finished(comparison.groups)
    if comparison.unfinished:
        blocks += _unfinished(comparison.unfinished)
    if comparison.source is not None:
        blocks += [Heading(2, "How to read this report"), Paragraph(f"Published: {comparison.source}.")]
        blocks.append(Paragraph(_EXPLANATION))
    for table in comparison.tables:
        if not table.entries:
            blocks.append(Folded(f"{table.table.title} (no run)", _table(table)))
    return blocks


def compose_results(comparison: Comparison) -> list[Block]:
    """Compose the verdict and one line per group of runs, without published tables and figures."""
    blocks: list[Block] = [Paragraph(verdict(comparison))]
    for table in comparison.tables:
        if table.entries:
            notes = _Notes()
            blocks += [Heading(3, table.table.title), _details(table, notes), *notes.block()]
    for title, section in _sections(comparison.others).items():
        blocks += [Heading(3, title), *_section(section)]
    return blocks


class _Notes:
    """Numbered remarks of a table; equal remarks share a number."""

    def __init__(self) -> None:
        self._texts: dict[str, list[str]] = {"s": [], "n": []}

    def mark(self, kind: str, text: str | None) -> str:
        """Return the mark of a remark; kind `s`: reason why a figure is suspect, `n`: any other."""
        if text is None:
            return ""
        texts = self._texts[kind]
        if text not in texts:
            texts.append(text)
        return f" [{kind}{texts.index(text) + 1}]"

    def block(self) -> list[Block]:
        items = [f"[s{i}] suspect: {text}." for i, text in enumerate(self._texts["s"], 1)]
        items += [f"[n{i}] {text}." for i, text in enumerate(self._texts["n"], 1)]
        return [Bullets(items)] if items else []


def _table(compared: ComparedTable) -> list[Block]:
    """Compose a published table, below the runs of its figures."""
    table, notes = compared.table, _Notes()
    blocks: list[Block] = [_details(compared, notes)] if compared.entries else []
    blocks += [_overview(compared, notes), *notes.block()]
    if compared.related:
        blocks += _all_runs(compared)
    missing = [line for line in compared.lines if line.missing is None and not line.full]
    if missing:
        blocks.append(Paragraph(_command_for(compared, missing)))
    if compared.entries:
        blocks += _pictures(compared.name, table.title, table.column, _points(compared))
    return blocks


def _pictures(name: str, title: str, column: str, points: Sequence[report_plots.Point]) -> list[Block]:
    """Plot accuracy over the column, if it is numeric, and by method."""
    over, by = f"{title}: top-1 accuracy over {column}", f"{title}: top-1 accuracy by method"
    lines = report_plots.over_columns(points, column, over)
    pictures: list[Block] = [] if lines is None else [Picture(f"{name}-over-{column}", lines, over)]
    dots = report_plots.by_method(points, column, by)
    return [*pictures, Picture(f"{name}-by-method", dots, by)]


def _result_columns(
    groups: Sequence[Group], count: str, lengths: Mapping[Group, str], similar: Sequence[Identity] | None
) -> Columns:
    """Columns of results, length and recipe of groups; head, medium and tail if any of `groups` has them.

    Args:
        count: `steps` or `epochs`.
        similar: recipes to distinguish the recipe from; None for those of the same method and dimension.
    """
    frequencies = [name for name in GROUPS if any(name in group.by_frequency for group in groups)]

    def frequency(name: str) -> Callable[[Group], str]:
        return lambda group: _text(group.by_frequency.get(name))

    def calibration(key: str) -> Callable[[Group], str]:
        return lambda group: _text(group.summary(key))

    known = {key for key in ("ece_last", "ece_calibrated") for group in groups if group.summary(key)}

    def recipe(group: Group) -> str:
        same = [g.identity for g in groups if (g.method, g.dim) == (group.method, group.dim)]
        text = describe(group.identity, among=same if similar is None else similar)
        return text if group.images is None else f"{text}; data {group.images}"

    return {
        "best": lambda group: str(group.best),
        "last": lambda group: str(group.last),
        "n": lambda group: str(group.n),
        **{name: frequency(name) for name in frequencies},
        **{term(key): calibration(key) for key in ("ece_last", "ece_calibrated") if key in known},
        count: lambda group: f"{getattr(group, count):,}",
        "length ": lambda group: lengths[group],
        "recipe ": recipe,
    }


def _dimension_column(table_column: str) -> Columns:
    """Embedding dimension, unless the table has it as its column."""
    return {} if table_column == "d" else {"d": lambda group: str(group.dim)}


def _overview(compared: ComparedTable, notes: _Notes) -> Grid:
    """Compose the table in its published form; rows with full runs are followed by their accuracies."""
    table = compared.table
    heads = ["method ", " ", *(f"{table.column} = {column}" for column in table.columns)]
    rows: list[list[str]] = []
    for name, row in table.rows.items():
        lines = {line.cell.column: line for line in compared.lines if line.cell.row == name}
        cells = [lines.get(column) for column in table.columns]
        method = name + (f" ({row.venue})" if row.venue else "") + notes.mark("n", row.note)
        method += notes.mark("n", next((line.missing for line in lines.values() if line.missing), None))
        rows.append([method, "published", *(_figure(line, notes) if line else _DASH for line in cells)])
        if any(line.full for line in lines.values()):
            for key in ("best", "last"):
                rows.append(["", f"{key} epoch", *(_measured(line, key) for line in cells)])
    return Grid(heads, rows)


def _figure(line: Line, notes: _Notes) -> str:
    return f"{line.cell.top1}{notes.mark('s', line.cell.suspect)}"


def _measured(line: Line | None, key: str) -> str:
    """Accuracies of the full runs of a cell; several if they differ in a setting that the cell leaves open."""
    full = line.full if line else []
    return "; ".join(f"{getattr(group, key)} (n = {group.n})" for group in full) or _DASH


def _details(compared: ComparedTable, notes: _Notes) -> Grid:
    """Compose one line per group of runs of a published figure."""
    groups = [entry.group for entry in compared.entries]
    grids = [_detail(compared, line, groups, notes) for line in compared.lines if line.entries]
    return Grid(grids[0].heads, [row for one in grids for row in one.rows])


def _detail(compared: ComparedTable, line: Line, groups: Sequence[Group], notes: _Notes) -> Grid:
    lengths = {entry.group: _length(entry) for entry in line.entries}
    results = _result_columns(groups, "steps", lengths, [group.identity for group in lengths])
    columns: Columns = {
        "method ": lambda _: line.cell.row,
        compared.table.column: lambda _: str(line.cell.column),
        **_dimension_column(compared.table.column),
        "published": lambda _: _figure(line, notes),
        "best": results["best"],
        "difference": lambda g: f"{g.best.mean - line.cell.top1:+.2f}" if g in line.full else _DASH,
    }
    return grid({**columns, **results}, lengths)


def _all_runs(compared: ComparedTable) -> list[Block]:
    """Compose a table of all groups on the data of the table, ordered by column, length and accuracy."""
    column = compared.table.column
    key = {"d": "model.embedding_dim", "imbalance": "data.imbalance", "backbone": "model.backbone"}[column]
    lengths = {entry.group: _length(entry) for entry in compared.entries}
    lengths |= {group: _completed(group) for group in compared.related}
    groups = sorted(lengths, key=lambda g: (_sortable(g.identity[key]), -g.epochs, -g.best.mean))
    columns: Columns = {
        column: lambda group: str(group.identity[key]),
        **_dimension_column(column),
        "method ": lambda group: group.method,
        **_result_columns(groups, "epochs", lengths, None),
    }
    text = "All runs on this data, including those without a published figure:"
    return [Paragraph(text), grid(columns, groups)]


def _sortable(value: float | str) -> tuple[float, str]:
    return (0.0, value) if isinstance(value, str) else (float(value), "")


def _completed(group: Group) -> str:
    if group.is_cut:
        return f"CUT after {group.epochs} of {group.identity['train.epochs']} epochs"
    early = group.num_stopped_early
    return f"complete; {early} of {group.n} stopped early" if early else "complete"


def _length(entry: Entry) -> str:
    """Length of training relative to the published configuration; deviations in upper case."""
    if entry.length == "full":
        return "full"
    kind = "SHORT" if entry.length == "short" else "OTHER LENGTH"
    return f"{kind}: {entry.group.steps:,} steps, {entry.group.epochs} epochs done"


def _command_for(compared: ComparedTable, missing: Sequence[Line]) -> str:
    names = list(dict.fromkeys(line.cell.row for line in missing))
    cells = " ".join(f"--published {compared.name}:{name}" for name in names)
    if len(names) == len(compared.table.rows):
        cells = f"--published {compared.name}"
    needs = sorted({key for line in missing for key in line.cell.needs})
    rest = " ".join([*(f"{key}=FILE" for key in needs), "data.root=DIR"])
    figures = "1 figure has" if len(missing) == 1 else f"{len(missing)} figures have"
    return f"{figures} no full run yet: {code(f'dl2pa sweep {cells} --seeds 0..2 {rest}')}"


def _points(compared: ComparedTable) -> list[report_plots.Point]:
    points: list[report_plots.Point] = []
    for line in compared.lines:
        cell = line.cell
        kind = "suspect" if cell.suspect else "published"
        points.append(report_plots.Point(cell.row, cell.column, cell.top1, None, kind))
        for entry in line.entries:
            best = entry.group.best
            kind = "measured" if entry.length == "full" else "short"
            points.append(report_plots.Point(cell.row, cell.column, best.mean, best.std, kind))
    return points


def _others(others: Sequence[Other], with_heading: bool) -> list[Block]:
    """Compose one table per data set of the runs without a published figure."""
    blocks: list[Block] = [Heading(2, "Runs without a published figure")] if with_heading else []
    for title, section in _sections(others).items():
        blocks += [Heading(3, title), *_section(section)]
        blocks += _section_pictures(title, [other.group for other in section])
    return blocks


def _sections(others: Sequence[Other]) -> dict[str, list[Other]]:
    """Group runs by data set."""
    sections: dict[str, list[Other]] = {}
    for other in others:
        sections.setdefault(other.group.data, []).append(other)
    return sections


def _section(section: Sequence[Other]) -> list[Block]:
    notes = _Notes()
    remarks = {other.group: other.remark or other.group.change_remark for other in section}
    groups = list(remarks)
    columns: Columns = {
        "method ": lambda group: group.method + notes.mark("n", remarks[group]),
        "network ": lambda group: str(group.identity["model.backbone"]),
        "d": lambda group: str(group.dim),
        **_result_columns(groups, "steps", {group: _completed(group) for group in groups}, None),
    }
    return [grid(columns, groups), *notes.block()]


def _section_pictures(title: str, groups: Sequence[Group]) -> list[Block]:
    points: list[report_plots.Point] = []
    for group, label in zip(groups, _labels(groups), strict=True):
        kind = "short" if group.is_cut else "measured"
        points.append(report_plots.Point(label, group.dim, group.best.mean, group.best.std, kind))
    name = "".join(c if c.isalnum() else "-" for c in title)
    return _pictures(f"runs-{name}", title, "d", points)


def _labels(groups: Sequence[Group]) -> list[str]:
    """Label groups by method and, if several have the same method and d, by assignment; numbered if still equal."""
    named: list[tuple[str, int]] = []
    for group in groups:
        same = [g for g in groups if (g.method, g.dim) == (group.method, group.dim)]
        assignments = {g.identity["method.assignment"] for g in same}
        method = (
            f"{group.method} {group.identity['method.assignment']}" if len(assignments) > 1 else group.method
        )
        named.append((method, group.dim))
    numbers = [named[: i + 1].count(name) for i, name in enumerate(named)]
    return [name if n == 1 else f"{name} ({n})" for (name, _), n in zip(named, numbers, strict=True)]


def _finished(groups: Iterable[Group]) -> list[Block]:
    """Compose a table of the individual runs."""
    heads = ["run ", "method ", "d", "seed", "best", "last", "steps", "processes", "device ", "code ", " "]
    rows: list[list[str]] = []
    for group in groups:
        rows += [_run_row(run, group, "") for run in group.runs]
        rows += [_run_row(run, group, f"repeat of seed {run.seed}: not counted") for run in group.repeats]
    if not rows:
        return [Paragraph("No finished runs.")]
    if not any(row[-1] for row in rows):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    return [Heading(2, "Finished runs"), Grid(heads, rows)]


def _run_row(run: Run, group: Group, remark: str) -> list[str]:
    result, environment = run.result, run.environment
    commit = str(environment.get("git_commit") or environment.get("dl2pa") or "unknown")[:10]
    if environment.get("git_dirty"):
        commit += ", changed"
    name = [code(run.path), group.method, str(group.dim), str(run.seed)]
    accuracies = [f"{result.top1_best:.2f}", f"{result.top1_last:.2f}"]
    device = str(environment.get("device") or "unknown")
    return [*name, *accuracies, f"{result.steps:,}", str(result.world_size), device, commit, remark]


def _unfinished(unfinished: Sequence[Unfinished]) -> list[Block]:
    rows = [[code(run.path), run.state, run.reason] for run in unfinished]
    remark = Paragraph("These runs are not included in the tables above.")
    return [Heading(2, "Unfinished runs"), remark, Grid(["run ", "state ", " "], rows)]


def _text(summary: Summary | None) -> str:
    return _DASH if summary is None else str(summary)
