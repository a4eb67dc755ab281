"""torchrun's agent: import the program once and fork the ranks of this machine.

Ranks are forked because importing torch takes seconds and hundreds of megabytes per process. No imported module may
start a thread or use a GPU before the fork (tests/unit/launcher/test_local.py). torchrun's error report is
suppressed, because ranks write error reports to the run directory.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dl2pa import envvars
from dl2pa.errors import EXIT_STOPPED
from launcher.local import ARGUMENTS
from launcher.node import Node
from launcher.rendezvous import NodeRendezvous

_PR_SET_NAME = 15


def _rank(module: str, arguments: list[str]) -> None:
    """Run `main(arguments)` of the module as one rank, with the rank as process name."""
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"dl2pa:rank {os.environ['RANK']}".encode())
    sys.argv = ["dl2pa", *arguments]  # the run records this as its command
    code = importlib.import_module(module).main(arguments)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the agent sends TERM when another rank failed
    if code:
        sys.exit(code)


def main(node: Node, nproc: int, folder: Path, modules: list[str], arguments: list[str]) -> int:
    """Run `main(arguments)` of the first module as `nproc` ranks; return the exit code.

    It is `EXIT_STOPPED` if the agents of the nodes did not connect in time, so that no rank has started.

    Args:
        folder: private folder for the store and torchrun's files.
        modules: imported before the ranks are forked.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[envvars.AGENT_PID] = str(os.getpid())
    for name in modules:
        importlib.import_module(name)
    rendezvous_handler_registry.register("dl2pa", lambda _: NodeRendezvous(node, folder))
    config = launch_config(node, nproc, folder, os.environ.get(envvars.NUMA, ""))
    try:
        elastic_launch(config, _rank)(modules[0], arguments)
    except ChildFailedError:
        return 1
    except DistError as error:  # of this process: ranks fail with ChildFailedError
        sys.stderr.write(f"dl2pa: {str(error).partition(chr(10))[0]}\n")
        return EXIT_STOPPED
    return 0


def launch_config(node: Node, nproc: int, folder: Path, numa_mode: str) -> LaunchConfig:
    """Configure torchrun.

    Without NUMA options, `LaunchConfig` counts the GPUs, which starts CUDA, and CUDA that was started before a fork
    cannot be used in the ranks. So it gets options that are removed afterward.

    Args:
        numa_mode: mode of NUMA binding; empty for none.
    """
    numa: dict[str, Any] = {}
    if "numa_options" in LaunchConfig.__dataclass_fields__:
        from torch.numa.binding import AffinityMode, NumaOptions

        numa["numa_options"] = NumaOptions(
            AffinityMode(numa_mode or "node"), should_fall_back_if_binding_fails=True
        )
        logging.getLogger("torch.numa.binding").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=node.count,
        max_nodes=node.count,
        nproc_per_node=nproc,
        run_id=node.rendezvous,
        rdzv_backend="dl2pa",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        # dl2pa handles stop signals: torchrun would end its workers without a save.
        signals_to_handle="SIGHUP,SIGQUIT",
        **numa,
    )
    if numa and not numa_mode:
        config.numa_options = None
    return config


if __name__ == "__main__":
    _node, _count, _folder, _modules = sys.argv[1:5]  # further words describe the process
    _arguments = json.loads((Path(_folder) / ARGUMENTS).read_text(encoding="utf-8"))
    sys.exit(main(Node(**json.loads(_node)), int(_count), Path(_folder), _modules.split(","), _arguments))
