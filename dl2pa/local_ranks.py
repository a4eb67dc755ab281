"""Work in several processes of this machine under torchrun's agent; errors are exchanged in a private folder."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, TrainingFailure, UserError
from dl2pa.osutil import write_atomically

_JOB = "job.json"


def run_ranks(modules: Sequence[str], job: Mapping[str, Any], nproc: int, folder: Path) -> None:
    """Run `main([folder])` of the first module, which calls ``work_as_rank``, in `nproc` processes.

    Args:
        modules: imported by the agent before it forks.
        job: JSON object that every process receives.
        folder: private folder, for the results too.

    Raises:
        UserError, TrainingFailure: the first error of a process.
        KeyboardInterrupt: a stop signal; the processes have ended.
    """
    from launcher.local import run_local
    from launcher.node import Node

    write_atomically(folder / _JOB, json.dumps(job))
    code = run_local(nproc, modules, [str(folder)], _interrupt, {}, Node(0, 1, "localhost", 0, "local"))
    _raise_first_error(folder)
    if code:
        raise TrainingFailure(f"the processes exited with code {code}")


def _interrupt() -> NoReturn:
    """End the work: there is nothing to save. The processes end with the agent, which this process kills."""
    raise KeyboardInterrupt


def work_as_rank(folder: Path, work: Callable[[dict[str, Any]], None]) -> int:
    """Do the work of one rank with the job of the folder; return the exit code. An error is written to the folder."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the agent sends TERM when another rank failed
    rank = int(os.environ["RANK"])
    level = logging.INFO if rank == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    try:
        work(json.loads((folder / _JOB).read_text(encoding="utf-8")))
    except Exception as error:
        user = error.as_dict() if isinstance(error, UserError) else None
        trace = None if isinstance(error, UserError | TrainingFailure) else traceback.format_exc()
        report = {"rank": rank, "time": time.time(), "error": user, "message": str(error), "traceback": trace}
        write_atomically(folder / f"rank-{rank}.error.json", json.dumps(report))
        return EXIT_FAILURE
    return EXIT_DONE


def _raise_first_error(folder: Path) -> None:
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("rank-*.error.json")]
    if not reports:
        return
    first = min(reports, key=lambda report: report["time"])
    if first["error"] is not None:
        raise UserError.from_dict(first["error"])
    if first["traceback"]:
        sys.stderr.write(first["traceback"])
    raise TrainingFailure(f"rank {first['rank']}: {first['message']}")
