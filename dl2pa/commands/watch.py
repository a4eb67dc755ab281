"""`dl2pa watch`: state, progress, remaining time and accuracy of all runs below a folder, refreshed."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from dl2pa.commands.live import LiveBlock, can_redraw, one_line
from dl2pa.commands.options import nonempty_path
from dl2pa.commands.output import aligned, note
from dl2pa.commands.run_states import LIVE, RunStates, count_states, find_runs
from dl2pa.errors import EXIT_DONE, UserError
from dl2pa.training.display import duration

_COLUMNS = ("state", "job", "epoch", "step", "loss", "images/s", "eta", "top1", "best", "gpu", "run")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        nargs="?",
        type=nonempty_path,
        default=Path("runs"),
        metavar="DIR",
        help="folder of the runs, or one run (default: runs)",
    )
    parser.add_argument("--once", action="store_true", help="print the table once, as without a terminal")
    parser.add_argument(
        "--every", type=_seconds, default=2.0, metavar="S", help="seconds between refreshes (default: 2)"
    )


def _seconds(value: str) -> float:
    """Argument type: a time of at least 0.1 s."""
    try:
        seconds = float(value)
    except ValueError:
        seconds = float("nan")
    if not 0.1 <= seconds <= 86400.0:
        raise argparse.ArgumentTypeError(f"{value} is not a number of seconds from 0.1 to 86400")
    return seconds


def run(args: argparse.Namespace) -> int:
    folder: Path = args.folder
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise UserError("DIR", str(folder), problem, "Give a run directory or the folder of the runs.")
    states = RunStates()
    terminal = sys.__stdout__
    if args.json:
        rows = states.describe(find_runs(folder))
        print(json.dumps({"dir": str(folder.absolute()), "runs": rows}), flush=True)  # noqa: T201
    elif args.once or terminal is None or not can_redraw(terminal):
        lines = _lines(states, folder, None)
        print("\n".join(map(one_line, lines)), flush=True)  # noqa: T201
    else:
        return _refresh(states, folder, LiveBlock(terminal), args.every)
    return EXIT_DONE


def _refresh(states: RunStates, folder: Path, block: LiveBlock, seconds: float) -> int:
    """Draw the table again and again until Ctrl-C or TERM; the last one stays on the screen."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background processes with SIGINT ignored
        signal.signal(number, _interrupt)
    try:
        while True:
            block.show(_lines(states, folder, block.height))
            time.sleep(seconds)
    except KeyboardInterrupt:
        note("stopped watching; the runs continue")
        return EXIT_DONE


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _lines(states: RunStates, folder: Path, height: int | None) -> list[str]:
    """Summary, header and one line per run, at most `height` lines; runs that train come first."""
    rows = states.describe(find_runs(folder))
    summary = f"{folder}: {count_states(rows)}"
    if not states.slurm_answers:
        summary += "; SLURM does not answer, so that the states of jobs are unknown"
    if height is not None:
        summary = f"{time.strftime('%H:%M:%S')}  {summary}"
    if not rows:
        return [summary]
    kept = rows if height is None or len(rows) + 2 <= height else rows[: max(1, height - 3)]
    table = aligned([_COLUMNS, *(_cells(row, folder.absolute()) for row in kept)])
    hidden = len(rows) - len(kept)
    more = [f"… and {hidden} more; `dl2pa watch DIR --once` prints all"] if hidden else []
    return [summary, *table, *more]


def _cells(row: Mapping[str, Any], folder: Path) -> Sequence[str]:
    path = Path(row["run_dir"])
    name = path.name if path == folder else str(path.relative_to(folder))
    trains = row["state"] in LIVE
    return [
        row["state"],
        row["job_id"] or "-",
        _of(row["epoch"], row["epochs"]),
        _of(row["step"], row["total_steps"]),
        _shown(row["loss"], "{:.4f}"),
        _shown(row["images_per_second"] if trains else None, "{:,.0f}"),
        "-" if row["eta_seconds"] is None else duration(row["eta_seconds"]),
        _shown(row["top1"], "{:.2f}"),
        _shown(row["top1_best"], "{:.2f}"),
        _shown(row["gpu_percent"] if trains else None, "{:.0f} %"),
        one_line(name),
    ]


def _of(value: Any, total: Any) -> str:
    return "-" if value is None else f"{value:.0f}" + ("" if total is None else f"/{total:.0f}")


def _shown(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)
