"""`dl2pa doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from dl2pa.commands import cluster_health
from dl2pa.commands.finding import Finding, server_health
from dl2pa.commands.output import say
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE


def run(args: argparse.Namespace) -> int:
    checks: list[Callable[[], Finding]] = [
        _python,
        *[_package(name, module, needed) for name, module, needed in _PACKAGES],
        _devices,
        _dali,
        _memory,
        _write_access,
        _data,
        _mlflow,
    ]
    findings = [check() for check in checks]
    findings += cluster_health.findings(on_a_node=args.cluster, partition=args.partition)
    broken = [f for f in findings if f.needed and not f.ok]
    if args.json:
        rows = {f.name: {"ok": f.ok, "seen": f.seen, "remedy": f.remedy or None} for f in findings}
        say({"ok": not broken, "checks": rows}, True, "")
    else:
        for f in findings:
            mark = "ok     " if f.ok else "MISSING" if f.needed else "absent "
            remedy = f"  ->  {f.remedy}" if not f.ok and f.remedy else ""
            print(f"{mark} {f.name:<14} {f.seen}{remedy}")  # noqa: T201
    return EXIT_FAILURE if broken else EXIT_DONE


_PACKAGES = (
    ("torch", "torch", True),
    ("torchvision", "torchvision", True),
    ("numpy", "numpy", True),
    ("scipy", "scipy", True),
    ("pydantic", "pydantic", True),
    ("safetensors", "safetensors", True),
    ("pillow", "PIL", True),
    ("scikit-learn", "sklearn", False),
    ("submitit", "submitit", False),
    ("mlflow", "mlflow", False),
    ("nvidia-dali-cuda130", "nvidia.dali", False),
)


def _python() -> Finding:
    version = platform.python_version_tuple()
    ok = (int(version[0]), int(version[1])) >= (3, 11)
    return Finding("python", ok, platform.python_version(), "Install Python 3.11 or newer.")


def _package(name: str, module: str, needed: bool) -> Callable[[], Finding]:
    def check() -> Finding:
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        try:
            seen = metadata.version(name)
        except metadata.PackageNotFoundError:
            seen = "installed" if found else "not installed"
        return Finding(name, found, seen, f"pip install {name}", needed)

    return check


def _devices() -> Finding:
    import torch

    if not torch.cuda.is_available():
        remedy = "Fine for small data; otherwise check the driver with nvidia-smi."
        return Finding("gpu", False, f"none; {len(os.sched_getaffinity(0))} CPU cores", remedy, needed=False)
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return Finding("gpu", True, f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")


def _dali() -> Finding:
    """Build and run the smallest pipeline: an import alone does not show that DALI works."""
    try:
        import numpy as np
        from nvidia import dali

        library: Any = dali  # its operators are made at import: a type checker cannot see them

        @library.pipeline_def(batch_size=1, num_threads=1, device_id=None)
        def graph() -> Any:
            return library.fn.constant(idata=[7], device="cpu")

        pipe: Any = graph()
        pipe.build()
        (out,) = pipe.run()
        works = int(np.asarray(out.as_cpu().as_array()).ravel()[0]) == 7
    except Exception as error:  # whatever DALI's native code says is the finding
        return Finding(
            "dali runs", False, str(error).splitlines()[0], "Or set data.loader=torchvision.", False
        )
    return Finding("dali runs", works, "a CPU pipeline ran")


def _memory() -> Finding:
    shm = shutil.disk_usage("/dev/shm")
    ok = shm.total >= 1 << 30
    return Finding(
        "/dev/shm", ok, f"{shm.total / 2**30:.1f} GiB", "In a container give --shm-size=8g.", False
    )


def _write_access() -> Finding:
    folder = Path("runs") if Path("runs").is_dir() else Path()
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return Finding(
            "write access", False, f"{folder.absolute()}: {error.strerror}", "Choose another --run-dir."
        )
    return Finding("write access", True, f"{folder.absolute()}, {free:.0f} GiB free")


def _data() -> Finding:
    root = os.environ.get("DL2PA_DATA")
    if not root:
        return Finding("DL2PA_DATA", False, "not set", "Set it, or data.root in the configuration.", False)
    return Finding(
        "DL2PA_DATA", Path(root).is_dir(), root, "The folder does not exist: mount or create it.", False
    )


def _mlflow() -> Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return Finding("mlflow uri", True, "not set: SQLite beside the runs")
    if not uri.startswith("http"):
        return Finding("mlflow uri", True, "a local store")
    said = server_health(uri)
    remedy = "Training spools; `dl2pa sync` sends it later."
    return Finding("mlflow uri", said == "the server answers", said, remedy, needed=False)
