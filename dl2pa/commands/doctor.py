"""`dl2pa doctor`: check packages, devices, folders, tracking server and cluster, with a remedy for each failure."""

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
from dl2pa.commands import cluster_health, gpu_health
from dl2pa.commands.finding import SERVER_ANSWERS, Finding, run_folder, server_health
from dl2pa.commands.options import check_output_file, nonempty_path
from dl2pa.commands.output import say
from dl2pa.container import in_container
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, StorageUnavailable, UserError
from dl2pa.osutil import usable_cores, write_atomically
from dl2pa.specs import is_remote

_REMOTE_S = 5.0
"""Time that object storage has to answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", action="store_true", help="also run checks on a compute node, in a short job"
    )
    parser.add_argument("--partition", metavar="P", help="partition of that job")
    parser.add_argument(
        "--write-profile",
        type=nonempty_path,
        metavar="FILE",
        help="draft a site file from what sinfo and scontrol report, and check nothing",
    )


def run(args: argparse.Namespace) -> int:
    if args.write_profile is not None:
        return _write_profile(args.write_profile, args.json)
    checks: list[Callable[[], Finding]] = [
        _python,
        *(_package(*package) for package in _PACKAGES),
        _devices,
        lambda: gpu_health.compiler(_gpu_works()),
        _dali,
        lambda: gpu_health.jpeg_decoder(_gpu_works()),
        _memory,
        _scratch,
        _write_access,
        *([_run_volume] if in_container() else []),
        _data,
        _mlflow,
    ]
    findings = [check() for check in checks]
    findings += cluster_health.findings(on_node=args.cluster, partition=args.partition)
    failed = any(f.needed and not f.ok for f in findings)
    if args.json:
        rows = {f.name: {"ok": f.ok, "seen": f.seen, "remedy": f.remedy or None} for f in findings}
        say({"ok": not failed, "checks": rows}, True, "")
    else:
        for f in findings:
            mark = "ok     " if f.ok else "MISSING" if f.needed else "absent "
            remedy = f"  ->  {f.remedy}" if not f.ok and f.remedy else ""
            print(f"{mark} {f.name:<14} {f.seen}{remedy}")  # noqa: T201
    return EXIT_FAILURE if failed else EXIT_DONE


def _write_profile(file: Path, as_json: bool) -> int:
    from launcher.site_draft import draft_site

    check_output_file("--write-profile", file)
    if file.exists():
        raise UserError("--write-profile", str(file), "exists", "Give a new file.")
    text = draft_site()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    except OSError as error:
        message = f"cannot be written ({error.strerror})"
        raise UserError("--write-profile", str(file), message, "Choose another file.") from None
    say({"site_file": str(file)}, as_json, "drafted; check it before use:")
    return EXIT_DONE


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
            installed = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            installed = False
        try:
            seen = metadata.version(name)
        except metadata.PackageNotFoundError:
            seen = "installed" if installed else "not installed"
        return Finding(name, installed, seen, f"pip install {name}", needed)

    return check


def _devices() -> Finding:
    """Compute on every visible GPU, which fails if this torch does not support the GPU."""
    import torch

    cores = f"{usable_cores()} CPU cores"
    if not torch.cuda.is_available():
        if _DRIVER.exists():
            seen = f"none visible, although this host has NVIDIA's driver; {cores}"
            remedy = f"Use docker run --gpus all or apptainer --nv, or update the driver for CUDA {torch.version.cuda}."
            return Finding("gpu", False, seen, remedy, needed=False)
        remedy = "CPUs suffice for small data; otherwise check the driver with nvidia-smi."
        return Finding("gpu", False, f"none; {cores}", remedy, needed=False)
    names: list[str] = []
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        names.append(name)
        try:
            torch.ones(2, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            return Finding("gpu", False, f"number {index}, {name}: {reason}", "See nvidia-smi.", needed=False)
    return Finding("gpu", True, f"{len(names)} x {', '.join(sorted(set(names)))}")


def _gpu_works() -> bool:
    import torch

    return torch.cuda.is_available()


def _dali() -> Finding:
    """Build and run a minimal pipeline, because importing DALI succeeds even if it cannot run."""
    try:
        import numpy as np
        from nvidia import dali

        library: Any = dali  # creates its operators at import, invisible to type checkers

        @library.pipeline_def(batch_size=1, num_threads=1, device_id=None)
        def graph() -> Any:
            return library.fn.constant(idata=[7], device="cpu")

        pipe: Any = graph()
        pipe.build()
        (out,) = pipe.run()
        works = int(np.asarray(out.as_cpu().as_array()).ravel()[0]) == 7
    except Exception as error:  # any error of DALI's native code
        remedy = "Reinstall DALI, or set data.loader=torchvision."
        return Finding("dali runs", False, str(error).splitlines()[0], remedy, needed=False)
    return Finding("dali runs", works, "a CPU pipeline ran")


def _memory() -> Finding:
    """Shared memory, which the processes of one machine exchange gradients through; 64 MiB by default in Docker."""
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError as error:
        size, seen = 0, str(error.strerror)
    else:
        seen = f"{size / 2**30:.1f} GiB"
    return Finding("/dev/shm", size >= 1 << 30, seen, "In a container, use --shm-size=8g.", needed=False)


def _scratch() -> Finding:
    """Folder for temporary files, which torchrun needs."""
    try:
        return Finding("scratch", True, tempfile.gettempdir())
    except FileNotFoundError:
        remedy = "In a container, use --tmpfs /tmp:exec; otherwise set TMPDIR."
        return Finding("scratch", False, "no temporary folder is writable", remedy)


def _write_access() -> Finding:
    folder = run_folder()
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        remedy = "Choose another --run-dir"
        if in_container():
            remedy += ', or run as the owner of the folder: docker run --user "$(id -u):$(id -g)"'
        return Finding("write access", False, f"{folder.absolute()}: {error.strerror}", f"{remedy}.")
    return Finding("write access", True, f"{folder.absolute()}, {free:.0f} GiB free")


def _run_volume() -> Finding:
    """Check that the folder of the runs remains after the container has ended."""
    folder = run_folder().absolute()
    if folder.stat().st_dev != Path("/").stat().st_dev:
        return Finding("run volume", True, f"{folder} is mounted")
    seen = f"{folder} is part of the container and is removed with it"
    return Finding("run volume", False, seen, "Mount a folder: docker run -v DIR:/runs.", needed=False)


def _data() -> Finding:
    root = os.environ.get(envvars.DATA)
    if not root:
        return Finding(
            "DL2PA_DATA", False, "not set", "Set it, or data.root in the configuration.", needed=False
        )
    if is_remote(root):
        return _remote_data(root)
    mount = "docker run -v DIR:/data:ro" if in_container() else "mount or create it"
    try:
        empty = next(os.scandir(root), None) is None
    except OSError as error:
        return Finding("DL2PA_DATA", False, f"{root}: {error.strerror}", f"Make it readable: {mount}.", False)
    return Finding("DL2PA_DATA", not empty, f"{root}{' is empty' * empty}", f"Fill it: {mount}.", False)


def _remote_data(root: str) -> Finding:
    """Check that the shards in object storage have an index that fits them."""
    from pipelines.remote.address import RemoteOptions, RemotePath, place_of
    from pipelines.remote.open import open_remote_index

    try:
        place = place_of("DL2PA_DATA", root, RemoteOptions(s3_timeout_s=_REMOTE_S, s3_retry_s=_REMOTE_S))
        assert isinstance(place, RemotePath)
        index, _ = open_remote_index(place, None, "DL2PA_DATA")
    except UserError as error:
        return Finding("DL2PA_DATA", False, f"{error.value}: {error.message}", error.remedy, False)
    except StorageUnavailable as error:
        remedy = "Set AWS_ENDPOINT_URL to the server of the bucket, or try again."
        return Finding("DL2PA_DATA", False, str(error), remedy, False)
    counts = ", ".join(f"{name} {len(split.table):,}" for name, split in index.splits.items())
    return Finding("DL2PA_DATA", True, f"{root}: {counts} images")


def _mlflow() -> Finding:
    uri = os.environ.get(envvars.TRACKING_URI)
    if not uri:
        return Finding("mlflow uri", True, "not set: SQLite in the folder of the runs")
    if not uri.startswith("http"):
        return Finding("mlflow uri", True, "a local store")
    health = server_health(uri)
    remedy = "Training spools its events; send them later with `dl2pa sync`."
    return Finding("mlflow uri", health == SERVER_ANSWERS, health, remedy, needed=False)
