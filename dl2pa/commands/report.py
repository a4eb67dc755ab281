"""`dl2pa report`: finished runs as tables, beside the published ones if wanted."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from dl2pa.commands.output import note, say, table
from dl2pa.config.published import published_file
from dl2pa.errors import EXIT_DONE, UserError
from dl2pa.reporting import Comparison, compare, find_runs, read_run, record, write_report
from dl2pa.reporting.compare import Entry


def run(args: argparse.Namespace) -> int:
    if args.compare is not None:
        return _compare(args)
    if args.uri is not None:
        _check_uri(args)
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
        note("--out DIR writes it as Markdown and HTML with plots")
    return EXIT_DONE


def _compare(args: argparse.Namespace) -> int:
    """Two runs beside each other."""
    from dl2pa.reporting.differences import compose_differences, differences, record_differences
    from dl2pa.reporting.document import to_markdown
    from dl2pa.reporting.write import write_document

    if args.run:
        runs = [str(path) for path in (*args.compare, *args.run)]
        raise UserError("--compare", " ".join(runs), f"compares two runs, not {len(runs)}", "Give two.")
    others = {
        "--published": args.published,
        "--tables": args.tables,
        "--mlflow": args.mlflow,
    }
    for option, given in others.items():
        if given:
            raise UserError(option, str(given), "does not go with --compare", "Leave one of them out.")
    first, second = args.compare
    found = differences(first, second, args.all)
    blocks = compose_differences(found)
    record_of = record_differences(found)
    files = [] if args.out is None else write_document(blocks, record_of, args.out)
    if args.json:
        say({**record_of, "files": [str(path) for path in files]}, True, "")
        return EXIT_DONE
    print(to_markdown(blocks), end="", flush=True)  # noqa: T201
    for path in files[:2]:
        note(f"written: {path}")
    return EXIT_DONE


def _print(comparison: Comparison) -> None:
    rows = [("table", "method", "column", "published", "best", "last", "n", "length")]
    for compared in comparison.tables:
        for line in compared.lines:
            cell = line.cell
            published = f"{cell.top1}{' suspect' if cell.suspect else ''}"
            for entry in line.entries:
                best, last = str(entry.group.best), str(entry.group.last)
                where = (compared.name, cell.row, str(cell.column), published)
                rows.append((*where, best, last, str(entry.group.n), _length(entry)))
    for other in comparison.others:
        group = other.group
        length = f"cut at {group.steps:,} steps" if group.is_cut else f"{group.epochs} epochs"
        where = (group.data, group.method, f"d = {group.dim}", "-")
        rows.append((*where, str(group.best), str(group.last), str(group.n), length))
    if len(rows) > 1:
        table(rows)
    for run in comparison.unfinished:
        note(f"not counted: {run.path}: {run.state}, {run.reason}")


def _length(entry: Entry) -> str:
    return "full" if entry.length == "full" else f"{entry.length}: {entry.group.steps:,} steps"


def _check_uri(args: argparse.Namespace) -> None:
    from dl2pa.tracking import check_uri

    check_uri("--uri", args.uri)
    if args.mlflow is None:
        raise UserError("--uri", args.uri, "is for --mlflow", "Add --mlflow EXPERIMENT, or leave it out.")


def _log(comparison: Comparison, experiment: str, uri: str | None, base: Path) -> str:
    """Put the report into MLflow; returns the run's id there."""
    from dl2pa.tracking.publish import publish_folder

    with tempfile.TemporaryDirectory() as folder:
        write_report(comparison, Path(folder))
        run_id = publish_folder(Path(folder), uri, base, experiment, "report")
    note(f"in MLflow: experiment {experiment}, run report ({run_id})")
    return run_id
