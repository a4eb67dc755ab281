"""Gloo process groups of forked ranks, for tests that compare several world sizes.

A program calls ``fork_groups``; its test reads the reports of the ranks with ``reports_of``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.paths import REPOSITORY

if TYPE_CHECKING:
    from dl2pa.training.distributed import World

Reports = dict[int, list[dict[str, Any]]]
"""World size to one report per rank."""


def reports_of(program: Path, out: Path) -> Reports:
    """Run a program, which writes to `out`, and return what its ranks report.

    Raises:
        AssertionError: a rank failed.
    """
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(program), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    reports: Reports = {}
    for size, rank in sorted(tuple(map(int, file.stem.split("-"))) for file in out.glob("*-*.json")):
        report = json.loads((out / f"{size}-{rank}.json").read_text(encoding="utf-8"))
        reports.setdefault(size, []).append(report)
    return reports


def fork_groups(report: Callable[[World], dict[str, Any]], sizes: Sequence[int]) -> None:
    """Call `report` in one group of processes per world size, write the results to the folder argv[1], and exit.

    The processes are forked after the imports, which take most of the time.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    out = Path(sys.argv[1])
    failed = 0
    for size in sizes:
        children: list[int] = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                try:
                    _rank(report, rank, size, out)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        failed += sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)
    sys.exit(failed)


def _rank(report: Callable[[World], dict[str, Any]], rank: int, size: int, out: Path) -> None:
    import torch
    from torch import distributed as dist

    from dl2pa.training.distributed import World

    torch.set_num_threads(1)
    side = None
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}/store-{size}", rank=rank, world_size=size)
        side = dist.new_group(backend="gloo")
    result = report(World(rank, size, rank, size, torch.device("cpu"), 1, side))
    (out / f"{size}-{rank}.json").write_text(json.dumps(result), encoding="utf-8")
