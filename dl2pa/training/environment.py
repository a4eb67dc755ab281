"""What the run ran on: versions, processor, code; enough to say whether two attempts must agree bit for bit."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dl2pa import __version__
from dl2pa.image import image_revision
from dl2pa.tracking import redact
from dl2pa.training.processes import World

_PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "numpy", "scipy", "pillow", "mlflow")
_BITWISE = ("dl2pa", *_PACKAGES[:-1], "processor", "world_size", "threads", "device")


def describe_environment(world: World) -> dict[str, Any]:
    """Versions, hardware, code and job of this attempt."""
    gpu = world.device.type == "cuda"
    slurm = {
        k: v
        for k, v in os.environ.items()
        if k in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_ARRAY_JOB_ID")
    }
    return {
        **{name: _version(name) for name in _PACKAGES},
        "dl2pa": __version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(world.device) if gpu else "cpu",
        "host": socket.gethostname(),
        "world_size": world.size,
        "threads": world.threads,
        "command": redact(" ".join(sys.argv)),
        "git_commit": _commit(),
        "git_dirty": bool(_git("status", "--porcelain")),
        **slurm,
    }


def bitwise_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed between attempts among the things that floating-point results depend on."""
    return [f"{k}: {before.get(k)} -> {now.get(k)}" for k in _BITWISE if before.get(k) != now.get(k)]


def code_version() -> dict[str, Any]:
    """Commit and uncommitted changes of the program, where it runs from a repository or an image of one."""
    return {"version": __version__, "git_commit": _commit(), "diff": _git("diff", "HEAD")}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _commit() -> str | None:
    """The repository's commit, else the one the image was built from; None where neither is known."""
    return _git("rev-parse", "HEAD") or image_revision()


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
