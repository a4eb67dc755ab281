"""Run a function in a process group on this machine."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed as dist

from dl2pa.errors import TrainingFailure


def run_in_group(nproc: int, threads: int, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function(*arguments)` in `nproc` new processes joined by gloo; return the result of rank 0.

    Args:
        threads: CPU threads per process.
        what: benchmarked case, for the error message, for instance `4 processes`.

    Raises:
        TrainingFailure: a process died.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # listen only on loopback
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__, "torch._dynamo"])  # import once, not per process
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_run_rank,
                args=(rank, nproc, threads, folder, sender, function, arguments),
                daemon=True,
            )
            for rank in range(nproc)
        ]
        for process in processes:
            process.start()
        sender.close()
        try:
            return receiver.recv()
        except EOFError:
            raise TrainingFailure(
                f"a benchmark process died while measuring {what} (out of memory?)"
            ) from None
        finally:
            for process in processes:
                process.join(60)


def _run_rank(
    rank: int,
    nproc: int,
    threads: int,
    folder: str,
    results: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=nproc)
    result = function(*arguments)
    if rank == 0:
        results.send(result)
    dist.barrier()
    dist.destroy_process_group()
