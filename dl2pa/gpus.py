"""GPUs that this process may use, found without importing torch, and the number of processes per machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

DEVICE_FILES = Path("/dev")
"""Folder of the device files of NVIDIA GPUs."""
_VARIABLE = "CUDA_VISIBLE_DEVICES"


def gpu_files() -> list[Path]:
    """Device files of the GPUs that this process may open."""
    return [path for path in DEVICE_FILES.glob("nvidia[0-9]*") if os.access(path, os.R_OK | os.W_OK)]


def visible_gpus() -> list[str]:
    """GPUs that CUDA will show to this process, as entries for CUDA_VISIBLE_DEVICES.

    As in CUDA, the list ends at the first invalid entry, and an entry that occurs twice hides all GPUs. CUDA uses one
    MIG instance per process.
    """
    count = len(gpu_files())
    value = os.environ.get(_VARIABLE)
    if value is None:
        return [str(index) for index in range(count)]
    names: list[str] = []
    for name in (entry.strip() for entry in value.split(",")):
        if not (name.startswith(("GPU-", "MIG-")) or (name.isdecimal() and int(name) < count)):
            break
        names.append(name)
    if len(set(names)) < len(names):
        return []
    mig = [name for name in names if name.startswith("MIG-")]
    return mig[:1] or names[:count]


def resolve_nproc(nproc: int | Literal["auto"], device: str) -> int:
    """Number of processes on this machine: with `auto` one per visible GPU, or 1 on a CPU."""
    if nproc != "auto":
        return nproc
    return max(1, len(visible_gpus())) if device != "cpu" else 1
