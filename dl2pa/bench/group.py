"""A function in a group of processes of this machine, joined by gloo."""

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


def in_a_group(nproc: int, threads: int, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returns on rank 0 of `nproc` new processes of `threads` threads each.

    Raises:
        TrainingFailure: one of them died; `what` says at what.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # of this machine: nothing listens beyond loopback
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [function.__module__, "torch._dynamo"]
    )  # imported once, not once a process
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_rank, args=(rank, nproc, threads, folder, sender, function, arguments), daemon=True
            )
            for rank in range(nproc)
        ]
        for process in processes:
            process.start()
        sender.close()
        try:
            return receiver.recv()
        except EOFError:
            raise TrainingFailure(f"a process of the benchmark died at {what} (out of memory?)") from None
        finally:
            for process in processes:
                process.join(60)


def _rank(
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
    found = function(*arguments)
    if rank == 0:
        results.send(found)
    dist.barrier()
    dist.destroy_process_group()
