"""A comparison in words: which tables, columns and remarks a reader sees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dl2pa.config.identity import Identity, describe
from dl2pa.reporting import report_plots
from dl2pa.reporting.compare import Compared, Comparison, Entry, Line, Other
from dl2pa.reporting.document import Block, Bullets, Grid, Heading, Paragraph, Picture, code
from dl2pa.reporting.groups import Group, Summary
from dl2pa.reporting.runs import Run, Unfinished
from pipelines.longtail import GROUPS

_DASH = "–"
_HOW_TO_READ = (
    "Accuracies are top-1 in per cent on the whole validation set: mean ± sample standard deviation over n seeds. "
    "A published figure is the best epoch on the test set, so it is set against our best epoch. That one is chosen on "
    "the images it is measured on: the honest figure is the last. A mark [s…] names why a published figure cannot be "
    "trusted."
)


def compose(comparison: Comparison) -> list[Block]:
    """The report."""
    blocks: list[Block] = [Heading(1, "Published tables and our runs" if comparison.source else "Runs")]
    if comparison.source is not None:
        blocks += [Paragraph(f"Published: {comparison.source}."), Paragraph(_HOW_TO_READ)]
    for table in comparison.tables:
        blocks += _table(table)
    if comparison.others:
        blocks += _others(comparison.others, bool(comparison.source))
    blocks += _every_run(comparison.groups)
    if comparison.unfinished:
        blocks += _unfinished(comparison.unfinished)
    return blocks


class _Notes:
    """Numbered remarks below a table, each once."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._counts = {"s": 0, "n": 0}

    def mark(self, kind: str, text: str | None) -> str:
        """The mark that stands for the text: `s` for what makes a figure suspect, `n` for the rest."""
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


def _table(compared: Compared) -> list[Block]:
    table, notes = compared.table, _Notes()
    blocks: list[Block] = [Heading(2, table.title)]
    blocks.append(_overview(compared, notes))
    if compared.has_runs:
        blocks.append(_details(compared, notes))
    blocks += notes.block()
    if compared.beside:
        blocks += _side_by_side(compared)
    missing = [line for line in compared.lines if line.missing is None and not line.full]
    if missing:
        blocks.append(Paragraph(_how_to_fill(compared, missing)))
    if compared.has_runs:
        points, column = _points(compared), table.column
        lines = report_plots.over_columns(points, column, f"{table.title}: accuracy over {column}")
        if lines is not None:
            text = f"{table.title}: top-1 over {column}, published and ours"
            blocks.append(Picture(f"{compared.name}-over-{column}", lines, text))
        dots = report_plots.by_method(points, column, f"{table.title}: accuracy by method")
        text = f"{table.title}: top-1 by method, published and ours"
        blocks.append(Picture(f"{compared.name}-by-method", dots, text))
    return blocks


def _overview(compared: Compared, notes: _Notes) -> Grid:
    """The table in its published form, ours below each row that has full runs."""
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
            for title, key in (("ours, best", "best"), ("ours, last", "last")):
                cells = [_ours(lines.get(column), key) for column in table.columns]
                rows.append(["", title, *cells])
    return Grid(heads, rows)


def _figure(line: Line | None, notes: _Notes) -> str:
    return _DASH if line is None else f"{line.cell.top1}{notes.mark('s', line.cell.suspect)}"


def _ours(line: Line | None, key: str) -> str:
    """The full runs of a cell; several groups where they differ in what the cell leaves to the user."""
    if line is None or not line.full:
        return _DASH
    return "; ".join(f"{getattr(group, key)} (n = {group.n})" for group in line.full)


def _details(compared: Compared, notes: _Notes) -> Grid:
    """A line for each group of runs beside its published figure."""
    table = compared.table
    groups = [entry.group for line in compared.lines for entry in line.entries]
    tail = [name for name in GROUPS if any(name in group.by_frequency for group in groups)]
    d = [] if table.column == "d" else ["d"]
    heads = ["method ", table.column, *d, "published", "ours, best", "difference", "ours, last", "n", *tail]
    heads += ["ECE", "steps", "length ", "recipe "]
    rows: list[list[str]] = []
    for line in compared.lines:
        for entry in line.entries:
            group = entry.group
            published = f"{line.cell.top1}{notes.mark('s', line.cell.suspect)}"
            gap = f"{group.best.mean - line.cell.top1:+.2f}" if entry.length == "full" else _DASH
            beside = [other.group.identity for other in line.entries]
            rows.append(
                [line.cell.row, str(line.cell.column), *([str(group.dim)] if d else []), published]
                + [str(group.best), gap, str(group.last), str(group.n)]
                + [_text(group.by_frequency.get(name)) for name in tail]
                + [
                    _text(group.ece),
                    f"{group.steps:,}",
                    _length(entry),
                    describe(group.identity, beside=beside),
                ]
            )
    return Grid(heads, rows)


def _side_by_side(compared: Compared) -> list[Block]:
    """Every group on the table's data, of its cells or not, by column; of equal length the best first."""
    column = compared.table.column
    entries = [entry for line in compared.lines for entry in line.entries]
    ours = [(entry.group, _length(entry)) for entry in {id(e.group): e for e in entries}.values()]
    ours += [(group, _own_length(group)) for group in compared.beside]
    groups = [group for group, _ in ours]
    tail = [name for name in GROUPS if any(name in group.by_frequency for group in groups)]
    d = [] if column == "d" else ["d"]
    heads = [column, *d, "method ", "best", "last", "n", *tail, "ECE", "epochs", "length ", "recipe "]
    ours.sort(key=lambda one: (_sortable(_column_of(one[0], column)), -one[0].epochs, -one[0].best.mean))
    rows = [
        [str(_column_of(group, column)), *([str(group.dim)] if d else []), group.method]
        + [str(group.best), str(group.last), str(group.n)]
        + [_text(group.by_frequency.get(name)) for name in tail]
        + [_text(group.ece), str(group.epochs), length]
        + [describe(group.identity, beside=_of_method(group, groups))]
        for group, length in ours
    ]
    said = "All our runs on this data, those of no published figure among them:"
    return [Paragraph(said), Grid(heads, rows)]


def _of_method(group: Group, groups: Iterable[Group]) -> list[Identity]:
    """The recipes with which a line's could be confused."""
    return [g.identity for g in groups if (g.method, g.dim) == (group.method, group.dim)]


def _column_of(group: Group, column: str) -> int | float | str:
    keys = {"d": "model.embedding_dim", "imbalance": "data.imbalance", "backbone": "model.backbone"}
    return group.identity[keys[column]]


def _sortable(value: float | str) -> tuple[float, str]:
    return (0.0, value) if isinstance(value, str) else (float(value), "")


def _own_length(group: Group) -> str:
    return f"CUT after {group.epochs} of {group.identity['train.epochs']} epochs" if group.is_cut else "whole"


def _length(entry: Entry) -> str:
    """Whether the runs are as long as the published configuration, said so that it cannot be overlooked."""
    group = entry.group
    if entry.length == "full":
        return "full"
    done = f"{group.steps:,} steps, {group.epochs} epochs done"
    return f"SHORT: {done}" if entry.length == "short" else f"OTHER LENGTH: {done}"


def _how_to_fill(compared: Compared, missing: Sequence[Line]) -> str:
    names = list(dict.fromkeys(line.cell.row for line in missing))
    every = len(names) == len(compared.table.rows)
    cells = (
        f"--cells {compared.name}" if every else " ".join(f"--cells {compared.name}:{name}" for name in names)
    )
    needs = sorted({key for line in missing for key in line.cell.needs})
    rest = " ".join([*(f"{key}=FILE" for key in needs), "data.root=DIR"])
    count = len(missing)
    begin = "A figure has" if count == 1 else f"{count} figures have"
    return f"{begin} no full run of ours yet: {code(f'dl2pa sweep {cells} --seeds 0..2 {rest}')}"


def _points(compared: Compared) -> list[report_plots.Point]:
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


def _others(others: Sequence[Other], beside_tables: bool) -> list[Block]:
    """Runs that no published figure is of, a table a data set."""
    blocks: list[Block] = []
    if beside_tables:
        blocks.append(Heading(2, "Runs beside no published figure"))
    sections: dict[str, list[Other]] = {}
    for other in others:
        sections.setdefault(other.group.data, []).append(other)
    for title, section in sections.items():
        blocks += [Heading(3, title), *_section(section)]
        blocks += _section_pictures(title, [other.group for other in section])
    return blocks


def _section(section: Sequence[Other]) -> list[Block]:
    groups, notes = [other.group for other in section], _Notes()
    tail = [name for name in GROUPS if any(name in group.by_frequency for group in groups)]
    heads = ["method ", "network ", "d", "best", "last", "n", *tail, "ECE", "steps", "length ", "recipe "]
    rows: list[list[str]] = []
    for other in section:
        group = other.group
        remark = other.remark or (f"{', '.join(group.changed)} changed midway" if group.changed else None)
        rows.append(
            [group.method + notes.mark("n", remark), str(group.identity["model.backbone"]), str(group.dim)]
            + [str(group.best), str(group.last), str(group.n)]
            + [_text(group.by_frequency.get(name)) for name in tail]
            + [_text(group.ece), f"{group.steps:,}", _own_length(group)]
            + [describe(group.identity, beside=_of_method(group, groups))]
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
    blocks: list[Block] = []
    lines = report_plots.over_columns(points, "d", f"{title}: accuracy over d")
    if lines is not None:
        blocks.append(Picture(f"runs-{name}-over-d", lines, f"{title}: top-1 over d"))
    dots = report_plots.by_method(points, "d", f"{title}: accuracy by method")
    return [
        *blocks,
        Picture(f"runs-{name}-by-method", dots, f"{title}: top-1 by method, in the table's order"),
    ]


def _every_run(groups: Iterable[Group]) -> list[Block]:
    """What the means are made of."""
    heads = ["run ", "method ", "d", "seed", "best", "last", "steps", "processes", "device ", "code ", " "]
    rows: list[list[str]] = []
    for group in groups:
        rows += [_run_row(run, group, "") for run in group.runs]
        rows += [_run_row(run, group, f"repeats seed {run.seed}: not counted") for run in group.repeats]
    if not rows:
        return [Paragraph("No run is finished.")]
    return [Heading(2, "Every finished run"), Grid(heads, rows)]


def _run_row(run: Run, group: Group, remark: str) -> list[str]:
    result, environment = run.result, run.environment
    commit = str(environment.get("git_commit") or environment.get("dl2pa") or "unknown")[:10]
    if environment.get("git_dirty"):
        commit += ", changed"
    figures = [
        f"{result.top1_best:.2f}",
        f"{result.top1_last:.2f}",
        f"{result.steps:,}",
        str(result.world_size),
    ]
    who = [code(run.path), group.method, str(group.dim), str(run.seed)]
    return [*who, *figures, str(environment.get("device") or "unknown"), commit, remark]


def _unfinished(unfinished: Sequence[Unfinished]) -> list[Block]:
    rows = [[code(run.path), run.state, run.reason] for run in unfinished]
    said = Paragraph("These stand in no table above.")
    return [Heading(2, "Runs that are not finished"), said, Grid(["run ", "state ", " "], rows)]


def _text(summary: Summary | None) -> str:
    return _DASH if summary is None else str(summary)
