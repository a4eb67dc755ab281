"""Fixtures of the GPU tests. Without a GPU they are skipped; REHEARSE=1 runs them on the CPU with small sizes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

REHEARSE = bool(os.environ.get("REHEARSE"))
Make = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or REHEARSE:
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a GPU (REHEARSE=1 runs on the CPU)"))


@pytest.fixture(scope="session")
def rehearsing() -> bool:
    """Whether the CPU replaces the GPU."""
    return REHEARSE


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu") if REHEARSE else torch.device("cuda", 0)


@pytest.fixture
def world(device: torch.device) -> Any:
    """One process on the device."""
    return world_on(device)


def world_on(device: torch.device) -> Any:
    distributed = pytest.importorskip("dl2pa.training.distributed", exc_type=ImportError)
    return distributed.World(0, 1, 0, 1, device, 4)


@pytest.fixture
def row() -> Callable[..., None]:
    """Print a measurement as one line of JSON, at once; pytest runs with -s."""

    def write(**values: Any) -> None:
        print(json.dumps(values), flush=True)

    return write


@pytest.fixture
def make_config() -> Make:
    """``make_config({"name": "etf"}, backbone="resnet8", batch_size=16)``: a small configuration."""
    config = pytest.importorskip("dl2pa.config", exc_type=ImportError)

    def make(
        method: dict[str, Any] | None = None,
        *,
        backbone: str = "resnet20",
        image_size: int = 32,
        optim: dict[str, Any] | None = None,
        **train: Any,
    ) -> Any:
        tree = {
            "method": method or {},
            "data": {"dataset": "cifar10", "crop": "pad", "image_size": image_size},
            "model": {"backbone": backbone, "embedding_dim": 5},
            "train": {"batch_size": 64, "mixup": 0.2, "cutmix": 1.0, "ema": 0.9, **train},
            "optim": {"lr": 0.1, **(optim or {})},
        }
        return config.parse_config(tree)

    return make


@pytest.fixture
def make_state(make_config: Make, device: torch.device) -> Make:
    """``make_state(config, on=device)``: a wrapped TrainState in training mode."""

    def make(config: Any, on: torch.device = device, steps_per_epoch: int = 10, wrap: bool = True) -> Any:
        from dl2pa.model.model import build_model
        from dl2pa.training.train_state import TrainState

        torch.manual_seed(0)
        state = TrainState(config, build_model(config, 10), world_on(on), steps_per_epoch)
        if wrap:
            state.wrap()
        state.model.train()
        return state

    return make


@pytest.fixture
def make_batch(device: torch.device) -> Make:
    """``make_batch(count, side, on=device)``: noise with labels 0 to 9, equal on every device."""

    def make(count: int, side: int = 32, on: torch.device = device) -> Any:
        from pipelines.batch import Batch

        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 3, side, side, generator=generator)
        labels = torch.arange(count) % 10
        return Batch(images.to(on), labels.to(on), torch.arange(count, device=on), count)

    return make


@pytest.fixture
def forbid_host_sync() -> Iterator[Callable[[], None]]:
    """Let CUDA raise an error at each host synchronization from the call on; restored after a failed test too."""

    def forbid() -> None:
        if not REHEARSE:
            torch.cuda.set_sync_debug_mode("error")

    yield forbid
    if not REHEARSE:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """Fill uninitialized memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in float32, without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def train_command(tmp_path: Path, rehearsing: bool) -> list[str]:
    """Arguments of a training of the quickstart in one process, without tracking."""
    root = Path(__file__).resolve().parents[2]
    return [
        *(
            "train",
            str(root / "configs/quickstart.yaml"),
            "--nproc",
            "1",
            "--json",
            "data.loader=torchvision",
        ),
        *("--run-dir", str(tmp_path / "run"), f"data.root={tmp_path / 'digits'}", "tracking.uri=none"),
        f"launch.device={'cpu' if rehearsing else 'cuda'}",
    ]
