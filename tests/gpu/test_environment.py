"""Driver, GPU, compiler and hardware decoder. Needs torch only."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Callable

import pytest
import torch

Row = Callable[..., None]


def test_driver_and_capability(device: torch.device, row: Row) -> None:
    row(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda)
    for name in ("nvidia.dali", "mlflow", "submitit", "pydantic"):
        try:
            row(package=name, installed=importlib.util.find_spec(name) is not None)
        except ModuleNotFoundError:
            row(package=name, installed=False)
    if device.type == "cpu":
        return
    fields = "name,driver_version,memory.total,compute_mode,mig.mode.current"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        row(gpus=subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines())
    row(capability=torch.cuda.get_device_capability(), nccl=torch.cuda.nccl.version())
    assert torch.ones(3, device=device).sum().item() == 3, "this torch does not support the GPU"
    assert torch.cuda.is_bf16_supported()


def test_the_compiler_of_torch_compile_works(row: Row) -> None:
    gpu_health = pytest.importorskip("dl2pa.commands.gpu_health", exc_type=ImportError)
    finding = gpu_health.compiler(gpu=True)
    row(compiler=finding.seen)
    assert finding.ok, finding


def test_the_hardware_decoder_works(device: torch.device, row: Row) -> None:
    gpu_health = pytest.importorskip("dl2pa.commands.gpu_health", exc_type=ImportError)
    if device.type == "cuda":
        torch.cuda.init()
    finding = gpu_health.jpeg_decoder(gpu=device.type == "cuda")
    row(jpeg_hardware=finding.seen)
    if device.type == "cpu" or "not installed" in finding.seen:
        pytest.skip(finding.seen)
    assert finding.ok, finding


def test_doctor_passes(row: Row) -> None:
    pytest.importorskip("pydantic")
    from support.commands import run_here

    done = run_here("doctor", "--json")
    for name, check in done.result["checks"].items():
        row(check=name, ok=check["ok"], seen=check["seen"])
    assert done.code == 0
