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

from dl2pa import envvars
from dl2pa.commands import cluster_health
from dl2pa.commands.finding import Finding, server_health
from dl2pa.commands.output import say
from dl2pa.container import in_container
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE
from dl2pa.osutil import usable_cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", action="store_true", help="also run checks on a compute node, in a short job"
    )
    parser.add_argument("--partition", metavar="P", help="partition of that job")


def run(args: argparse.Namespace) -> int:
    checks: list[Callable[[], Finding]] = [
        _python,
        *[_package(name, module, needed) for name, module, needed in _PACKAGES],
        _devices,
        _dali,
        _memory,
        _scratch,
        _write_access,
        *([_run_volume] if in_container() else []),
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


_DRIVER = Path("/proc/driver/nvidia/version")
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
    """Whether every GPU that is visible computes: one too old or too new for this torch shows only then."""
    import torch

    cores = f"{usable_cores()} CPU cores"
    if not torch.cuda.is_available():
        if _DRIVER.exists():
            seen = f"none visible, though this host has NVIDIA's driver; {cores}"
            remedy = f"docker run --gpus all, apptainer --nv; or the driver is too old for CUDA {torch.version.cuda}."
            return Finding("gpu", False, seen, remedy, needed=False)
        remedy = "Fine for small data; otherwise check the driver with nvidia-smi."
        return Finding("gpu", False, f"none; {cores}", remedy, needed=False)
    names: list[str] = []
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        names.append(name)
        try:
            torch.ones(2, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            return Finding("gpu", False, f"number {index}, {name}: {said}", "See nvidia-smi.", needed=False)
    return Finding("gpu", True, f"{len(names)} x {', '.join(sorted(set(names)))}")


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
    """Processes of one machine exchange gradients through it; a container's default is 64 MiB."""
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError as error:
        size, seen = 0, str(error.strerror)
    else:
        seen = f"{size / 2**30:.1f} GiB"
    return Finding("/dev/shm", size >= 1 << 30, seen, "In a container give --shm-size=8g.", False)


def _scratch() -> Finding:
    """A place for temporary files, which torchrun needs."""
    try:
        return Finding("scratch", True, tempfile.gettempdir())
    except FileNotFoundError:
        remedy = "In a container give --tmpfs /tmp; elsewhere set TMPDIR."
        return Finding("scratch", False, "no temporary folder can be written", remedy)


def _write_access() -> Finding:
    folder = _run_folder()
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        remedy = "Choose another --run-dir"
        if in_container():
            remedy += ', or run as the folder\'s owner: docker run --user "$(id -u):$(id -g)"'
        return Finding("write access", False, f"{folder.absolute()}: {error.strerror}", f"{remedy}.")
    return Finding("write access", True, f"{folder.absolute()}, {free:.0f} GiB free")


def _run_volume() -> Finding:
    """Whether the runs outlive the container."""
    folder = _run_folder().absolute()
    if folder.stat().st_dev != Path("/").stat().st_dev:
        return Finding("run volume", True, f"{folder} is mounted")
    seen = f"{folder} is part of the container and ends with it"
    return Finding("run volume", False, seen, "docker run -v DIR:/runs", needed=False)


def _run_folder() -> Path:
    return Path("runs") if Path("runs").is_dir() else Path()


def _data() -> Finding:
    root = os.environ.get(envvars.DATA)
    if not root:
        return Finding("DL2PA_DATA", False, "not set", "Set it, or data.root in the configuration.", False)
    mount = "docker run -v DIR:/data:ro" if in_container() else "mount or create it"
    try:
        empty = next(os.scandir(root), None) is None
    except OSError as error:
        return Finding("DL2PA_DATA", False, f"{root}: {error.strerror}", f"Make it readable: {mount}.", False)
    return Finding("DL2PA_DATA", not empty, f"{root}{' is empty' * empty}", f"Fill it: {mount}.", False)


def _mlflow() -> Finding:
    uri = os.environ.get(envvars.TRACKING_URI)
    if not uri:
        return Finding("mlflow uri", True, "not set: SQLite beside the runs")
    if not uri.startswith("http"):
        return Finding("mlflow uri", True, "a local store")
    said = server_health(uri)
    remedy = "Training spools; `dl2pa sync` sends it later."
    return Finding("mlflow uri", said == "the server answers", said, remedy, needed=False)
