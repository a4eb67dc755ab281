"""`dl2pa sync`: send the tracking events that a server does not have yet."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from dl2pa.commands.options import add_run, nonempty_path
from dl2pa.commands.output import note, say
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, nargs="*")
    parser.add_argument(
        "--all",
        type=nonempty_path,
        nargs="?",
        const=Path("runs"),
        metavar="DIR",
        help="every run in this folder, at any depth (default: runs)",
    )
    parser.add_argument("--uri", help="MLflow server or store (default: that of the run)")


def run(args: argparse.Namespace) -> int:
    from dl2pa.config.tracking import check_uri
    from dl2pa.reporting.runs import find_runs
    from dl2pa.rundir import RunDirectory
    from dl2pa.search.journal import is_search

    if args.uri is not None:
        check_uri("--uri", args.uri)
    if not args.run and args.all is None:
        raise UserError("run", None, "no run directory was given", "Name one, or give --all [DIR].")
    paths: list[Path] = list(args.run)
    if args.all is not None:
        named = {path.resolve() for path in paths}
        others = [path for path in find_runs([], args.all) if path.resolve() not in named]
        searches = [path for path in dict.fromkeys(path.parent for path in others) if is_search(path)]
        others += [path for path in searches if path.resolve() not in named]
        paths += [path for path in others if RunDirectory(path).spool.exists()]
    reports = [_sync(path, args.uri, keep_going=args.all is not None) for path in paths]
    failed = [report for report in reports if report.get("error")]
    if args.json and (len(reports) > 1 or args.all is not None):
        say({"runs": reports, "failed": len(failed)}, True, "")
    else:
        for path, report in zip(paths, reports, strict=True):
            say(report, args.json, f"{path}:")
    if args.all is not None:
        for report in failed:
            note(f"not completely sent: {report['run_dir']}: {report['error']}")
        note(f"{len(reports) - len(failed)} of {len(reports)} runs are completely sent")
    return EXIT_FAILURE if failed else EXIT_DONE


def _sync(path: Path, uri: str | None, *, keep_going: bool) -> dict[str, Any]:
    """Send one run and return its report.

    Args:
        keep_going: return an error as the field `error`, so that other runs can follow.
    """
    from dl2pa.config import load_recorded_config
    from dl2pa.ownership import is_owned
    from dl2pa.rundir import RunDirectory
    from dl2pa.search.journal import is_running, is_search
    from dl2pa.tracking.sync import recorded_server, sync

    directory = RunDirectory(path)
    try:
        if is_search(path):
            report = sync(path, uri, alive=is_running(path))
            return {key: _plain(value) for key, value in dataclasses.asdict(report).items()}
        if not directory.config.is_file():
            raise UserError("run", str(path), "is not a run directory", "Give the folder of a run.")
        recorded = recorded_server(path, load_recorded_config(directory.config).tracking.uri)
        report = sync(path, uri, recorded=recorded, alive=is_owned(directory))
    except (UserError, OSError) as error:
        if not keep_going:
            raise
        return {"run_dir": str(path), "error": str(error)}
    return {key: _plain(value) for key, value in dataclasses.asdict(report).items()}


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, str | int | float) else str(value)
