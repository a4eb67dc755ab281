"""Environment of a run: versions, hardware, code. Shows whether two attempts give bit-identical results."""

from __future__ import annotations

import functools
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dl2pa import __version__
from dl2pa.container import image_revision
from dl2pa.osutil import write_atomically
from dl2pa.redaction import redact, redact_command

if TYPE_CHECKING:
    import torch

    from dl2pa.training.distributed import World

log = logging.getLogger(__name__)

_SLURM = (
    *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"),
    *("SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_JOB_PARTITION", "SLURM_CLUSTER_NAME"),
)
_MAX_DIFF_CHARS = 1_000_000
_PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "numpy", "scipy", "pillow", "mlflow")
_BITWISE = ("dl2pa", *_PACKAGES[:-1], "processor", "world_size", "threads", "device")


def describe_environment(world: World, hosts: Sequence[str] = ()) -> dict[str, Any]:
    """Describe versions, hardware, code and job of this attempt.

    Args:
        hosts: host names of all ranks in rank order; default: this host.
    """
    import torch  # here, because `submit` needs only the code version

    gpu = world.device.type == "cuda"
    return {
        **{name: _version(name) for name in _PACKAGES},
        "dl2pa": __version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(world.device) if gpu else "cpu",
        "host": socket.gethostname(),
        "hosts": " ".join(dict.fromkeys(hosts or [socket.gethostname()])),
        "world_size": world.size,
        "threads": world.threads,
        "command": redact_command(["dl2pa", *sys.argv[1:]]),
        "cuda": torch.version.cuda if gpu else None,
        "image": image_revision(),
        "git_commit": _commit(),
        "git_dirty": bool(_git("status", "--porcelain")),
        **{name: os.environ[name] for name in _SLURM if os.environ.get(name)},
    }


def memory_usage(device: torch.device) -> dict[str, int]:
    """Memory use in bytes: the GPU peak since the last call and the process's current resident size."""
    usage: dict[str, int] = {}
    if device.type == "cuda":
        import torch

        usage["gpu_peak"] = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        usage["host"] = pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):  # not Linux
        usage["host"] = 0
    return usage


def bitwise_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the changes between two environments that floating-point results depend on."""
    return [f"{k}: {before.get(k)} -> {now.get(k)}" for k in _BITWISE if before.get(k) != now.get(k)]


def code_version() -> dict[str, Any]:
    """Version, commit and uncommitted changes of dl2pa; the last two are None outside a repository."""
    return {"version": __version__, "git_commit": _commit(), "diff": _git("diff", "HEAD")}


def write_code(folder: Path, attempt: int) -> list[Path]:
    """Write the installed packages and the uncommitted changes, without secrets, to reproduce this program.

    Returns:
        The files that were written. Failing to write one only logs a warning.
    """
    texts = {"requirements.txt": "\n".join(installed_packages()) + "\n"}
    changes = _git("diff", "HEAD")
    if changes:
        cut = "\n[truncated]" if len(changes) > _MAX_DIFF_CHARS else ""
        texts[f"attempt-{attempt}.diff"] = redact(changes[:_MAX_DIFF_CHARS]) + cut + "\n"
    written: list[Path] = []
    for name, text in texts.items():
        try:
            folder.mkdir(exist_ok=True)
            write_atomically(folder / name, text, private=name.endswith(".diff"))
        except OSError as error:
            log.warning("%s cannot be written: %s", folder / name, error)
        else:
            written.append(folder / name)
    return written


@functools.cache
def installed_packages() -> tuple[str, ...]:
    """Installed packages as ``name==version``, sorted; read once per process."""
    headers = [distribution.metadata for distribution in metadata.distributions()]
    return tuple(sorted({f"{h['Name']}=={h['Version']}" for h in headers if h["Name"]}, key=str.lower))


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
    """Commit of the repository or of the image; None if neither is known."""
    return _git("rev-parse", "HEAD") or image_revision()


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
