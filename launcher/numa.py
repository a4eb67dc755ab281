"""Binding of ranks to the CPU cores near their GPUs."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from dl2pa.config.schema import LaunchConfig
from dl2pa.gpus import visible_gpus

log = logging.getLogger(__name__)

NUMA_NODES = Path("/sys/devices/system/node")


def binding_mode(launch: LaunchConfig, nproc: int) -> str:
    """Mode of torchrun's `--numa-binding` for the ranks of this machine; empty for no binding.

    `auto` is `node` where binding works and can help: on GPUs, with several NUMA nodes. Another setting that does not
    work here is ignored with a warning.
    """
    mode = launch.numa_binding
    if mode == "off" or launch.device == "cpu":
        return ""
    reason = _unavailable(nproc)
    if mode == "auto":
        several = len(list(NUMA_NODES.glob("node[0-9]*"))) > 1
        return "node" if several and reason is None else ""
    if reason is not None:
        log.warning("launch.numa_binding=%s is ignored: %s", mode, reason)
        return ""
    return mode


def _unavailable(nproc: int) -> str | None:
    """Why torch cannot bind ranks on this machine; None if it can."""
    if len(visible_gpus()) < nproc:
        return "there are fewer GPUs than processes"
    if shutil.which("numactl") is None:
        return "torch requires the program numactl"
    return None
