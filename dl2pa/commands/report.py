"""`dl2pa report`: tables of finished runs, compared with published results or with each other."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dl2pa.commands.options import add_run, add_tables, check_output_folder, nonempty_path, nonempty_text
from dl2pa.commands.output import note, say, table
from dl2pa.config.published import published_file
from dl2pa.config.tracking import check_experiment
from dl2pa.errors import EXIT_DONE, UserError
from dl2pa.reporting import Comparison, compare, find_runs, read_run, record, write_report
from dl2pa.reporting.compare import Entry
from dl2pa.reporting.document import Block
from dl2pa.reporting.paired import compare_paired, compose_paired, paired_record
from dl2pa.reporting.runs import Run, Unfinished
from dl2pa.search.journal import is_search


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, nargs="*", help="run directories, or the folder of one search")
    parser.add_argument(
        "--all", type=nonempty_path, metavar="DIR", help="every run in this folder, at any depth"
    )
    parser.add_argument(
        "--compare",
        type=nonempty_path,
        nargs=2,
        metavar=("RUN_A", "RUN_B"),
        help="show the differences between two runs and whether they exceed the spread over seeds; "
        "--all DIR: folder of the runs with other seeds",
    )
    parser.add_argument(
        "--paired",
        type=nonempty_text,
        metavar="VARIANT",
        help="compare the variants of a sweep with this one, seed by seed",
    )
    parser.add_argument(
        "--metric",
        type=nonempty_text,
        metavar="METRIC",
        help="with --paired: the value to compare, such as ece_last or retrieval/validation/recall_at_1 "
        "(default: top1_last)",
    )
    parser.add_argument("--published", action="store_true", help="compare with the published tables")
    add_tables(parser)
    parser.add_argument(
        "--out", type=nonempty_path, metavar="DIR", help="write report.md, report.html and plots to DIR"
    )
    parser.add_argument(
        "--mlflow",
        metavar="EXPERIMENT",
        help="log the report to this experiment, as artifacts of the run `report`",
    )
    parser.add_argument(
        "--uri", help="MLflow server or store (default: MLFLOW_TRACKING_URI, otherwise the store of the runs)"
    )


def run(args: argparse.Namespace) -> int:
    if args.out is not None:
        check_output_folder("--out", args.out)
    if args.compare is not None:
        return _compare(args)
    if args.paired is not None:
        return _compare_paired(args)
    if args.metric is not None:
        raise UserError("--metric", args.metric, "requires --paired", "Add --paired VARIANT, or remove it.")
    if args.mlflow is not None:
        check_experiment("--mlflow", args.mlflow)
    if args.uri is not None:
        _check_uri(args)
    if any(is_search(path) for path in args.run):
        return _search(args)
    paths = find_runs(args.run, args.all)
    published = published_file(args.tables) if args.published or args.tables else None
    comparison = compare([read_run(path) for path in paths], published)
    files = [] if args.out is None else write_report(comparison, args.out)
    mlflow_run_id = None
    if args.mlflow is not None:
        base = args.all if args.all is not None else paths[0].absolute().parent
        mlflow_run_id = _log(comparison, args.mlflow, args.uri, base)
    if args.json:
        written = {"files": [str(path) for path in files], "mlflow_run_id": mlflow_run_id}
        say({**record(comparison), **written}, True, "")
        return EXIT_DONE
    _print(comparison)
    for path in files[:2]:
        note(f"written: {path}")
    if args.out is None:
        note("--out DIR writes the report as Markdown and HTML with plots")
    return EXIT_DONE


def _compare_paired(args: argparse.Namespace) -> int:
    """Compare the variants of a sweep with one of them."""
    from dl2pa.reporting.document import to_markdown
    from dl2pa.reporting.write import write_document

    _refuse_with("--paired", args)
    metric = args.metric or "top1_last"
    runs = [read_run(path) for path in find_runs(args.run, args.all)]
    tables = compare_paired([run for run in runs if isinstance(run, Run)], args.paired, metric)
    blocks = compose_paired(tables, args.paired, metric)
    content = paired_record(tables, args.paired, metric)
    files = [] if args.out is None else write_document(blocks, content, args.out)
    for run in runs:
        if isinstance(run, Unfinished):
            note(f"not compared: {run.path}: {run.state}, {run.reason}")
    if args.json:
        say({**content, "files": [str(path) for path in files]}, True, "")
        return EXIT_DONE
    print(to_markdown(blocks), end="", flush=True)  # noqa: T201
    for path in files[:2]:
        note(f"written: {path}")
    return EXIT_DONE


def _refuse_with(option: str, args: argparse.Namespace) -> None:
    """Refuse options of the report on all runs."""
    others = {
        "--published": args.published,
        "--tables": args.tables,
        "--mlflow": args.mlflow,
        "--uri": args.uri,
    }
    for other, value in others.items():
        if value is not None and value is not False:
            raise UserError(other, str(value), f"cannot be combined with {option}", "Remove one of them.")


def _compare(args: argparse.Namespace) -> int:
    """Compare two runs."""
    from dl2pa.reporting.differences import compare_runs, compose_differences
    from dl2pa.reporting.write import write_document

    if args.run:
        runs = [str(path) for path in (*args.compare, *args.run)]
        raise UserError("--compare", " ".join(runs), f"needs 2 runs, not {len(runs)}", "Give two runs.")
    _refuse_with("--compare", args)
    if args.paired is not None:
        message = "cannot be combined with --compare"
        raise UserError("--paired", args.paired, message, "Remove one of them.")
    if args.metric is not None:
        remedy = "Remove it; the comparison shows all metrics."
        raise UserError("--metric", args.metric, "cannot be combined with --compare", remedy)
    first, second = args.compare
    differences = compare_runs(first, second, args.all)
    blocks, content = compose_differences(differences), asdict(differences)
    files = [] if args.out is None else write_document(blocks, content, args.out)
    _show_document(blocks, content, files, args.json)
    return EXIT_DONE


def _show_document(
    blocks: Sequence[Block], content: dict[str, Any], files: Sequence[Path], as_json: bool
) -> None:
    from dl2pa.reporting.document import to_markdown

    if as_json:
        say({**content, "files": [str(path) for path in files]}, True, "")
        return
    print(to_markdown(blocks), end="", flush=True)  # noqa: T201
    for path in files[:2]:
        note(f"written: {path}")


def _search(args: argparse.Namespace) -> int:
    """Show the results of a search."""
    from dl2pa.reporting.search_report import compose_search
    from dl2pa.reporting.write import write_document
    from dl2pa.search.results import load_search_results

    if len(args.run) > 1:
        remedy = "Give one search, or run directories only."
        raise UserError("run", str(args.run[1]), "cannot be combined with a search", remedy)
    others = {
        "--all": args.all,
        "--published": args.published,
        "--tables": args.tables,
        "--mlflow": args.mlflow,
    }
    for option, value in others.items():
        if value:
            raise UserError(option, str(value), "cannot be combined with a search", "Remove one of them.")
    content = load_search_results(args.run[0])
    blocks = compose_search(content)
    files = [] if args.out is None else write_document(blocks, content, args.out)
    _show_document(blocks, content, files, args.json)
    return EXIT_DONE


def _print(comparison: Comparison) -> None:
    rows = [("table", "method", "column", "published", "best", "last", "n", "length")]
    for compared in comparison.tables:
        for line in compared.lines:
            cell = line.cell
            published = f"{cell.top1}{' suspect' if cell.suspect else ''}"
            for entry in line.entries:
                best, last = str(entry.group.best), str(entry.group.last)
                name = (compared.name, cell.row, str(cell.column), published)
                rows.append((*name, best, last, str(entry.group.n), _length(entry)))
    for other in comparison.others:
        group = other.group
        length = f"cut at {group.steps:,} steps" if group.is_cut else f"{group.epochs} epochs"
        name = (group.data, group.method, f"d = {group.dim}", "-")
        rows.append((*name, str(group.best), str(group.last), str(group.n), length))
    if len(rows) > 1:
        table(rows)
    for run in comparison.unfinished:
        note(f"not compared: {run.path}: {run.state}, {run.reason}")


def _length(entry: Entry) -> str:
    return "full" if entry.length == "full" else f"{entry.length}: {entry.group.steps:,} steps"


def _check_uri(args: argparse.Namespace) -> None:
    from dl2pa.config.tracking import check_uri

    check_uri("--uri", args.uri)
    if args.mlflow is None:
        raise UserError("--uri", args.uri, "requires --mlflow", "Add --mlflow EXPERIMENT or remove --uri.")


def _log(comparison: Comparison, experiment: str, uri: str | None, base: Path) -> str:
    """Log the report to MLflow and return the run id."""
    from dl2pa.reporting.compose import compose_results
    from dl2pa.reporting.document import to_markdown
    from dl2pa.reporting.verdict import metrics
    from dl2pa.tracking.publish import publish_folder

    with tempfile.TemporaryDirectory() as folder:
        write_report(comparison, Path(folder))
        description, values = to_markdown(compose_results(comparison)), metrics(comparison)
        place = Path(folder), uri, base, experiment, "report"
        run_id = publish_folder(*place, description=description, metrics=values)
    note(f"logged to MLflow: experiment {experiment}, run report ({run_id})")
    return run_id
