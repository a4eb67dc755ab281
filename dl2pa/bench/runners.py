"""What `dl2pa bench` times: things that take training steps, the program's own and the yardsticks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dl2pa.backbones import build_embedder
from dl2pa.bench.loaders import endless
from dl2pa.bench.reference import ReferenceLoop
from dl2pa.config import Config, parse_config
from dl2pa.methods import Targets
from dl2pa.model.model import build_model
from dl2pa.specs import BACKBONES, CIFAR100, DATASETS, SYNTHETIC
from dl2pa.training.data import build_train_pipeline, open_split
from dl2pa.training.distributed import World
from dl2pa.training.optim import build_optimizer
from dl2pa.training.train_state import PARTS, TrainState, autocast, compile_mode
from pipelines.datasets.arrays import ArrayDataset

Compile = bool | Literal["graphs"]
"""As `train.compile`."""
IMAGES = {True: 50_000, False: 1_281_167}
"""Of CIFAR and of ImageNet-1K: how many steps share one matching."""
_PROFILED = 5


def synthetic_config(
    model: str, batch_size: int, data: dict[str, Any] | None = None, train: dict[str, Any] | None = None
) -> Config:
    """A backbone on batches of CIFAR's or ImageNet's shape, which `data` and `train` change."""
    spec = BACKBONES[model]
    small = spec.small
    images = {
        "dataset": SYNTHETIC,
        "loader": DATASETS[SYNTHETIC].loader,
        "num_classes": 100 if small else 1000,
        "image_size": spec.bench_image_size,
        "synthetic_samples": [IMAGES[small], batch_size],
    }
    return parse_config(
        {
            "data": {**images, **(data or {})},
            "model": {"backbone": model, "embedding_dim": 50 if small else 512},
            "method": {"name": "dl2pa", "loss": "cross_entropy"},
            "optim": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
            "train": {"batch_size": batch_size, **(train or {})},
        }
    )


def resident_config(model: str, batch_size: int, train: dict[str, Any]) -> Config:
    """A small backbone on as many images as CIFAR has, held on the device; ``noise_set`` stands for the files."""
    data = {"dataset": CIFAR100, "root": "/", "loader": "resident", "crop": "pad"}
    return synthetic_config(model, batch_size, data, train)


class Runner(ABC):
    """Something that takes steps."""

    @abstractmethod
    def run(self, steps: int) -> None:
        """Take so many."""

    def more(self, step_s: float, ceilings: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Further columns of its row."""
        return {}

    def close(self) -> None:  # noqa: B027
        """End threads and processes."""


class Ours(Runner):
    """The program's own step on the program's own data."""

    def __init__(self, config: Config, world: World) -> None:
        self._config, self._world = config, world
        dataset = noise_set(config) if config.data.loader == "resident" else open_split(config, "train")
        self._pipeline = build_train_pipeline(config, dataset, world)
        classes = len(dataset.classes)
        self.train_state = TrainState(
            config, build_model(config, classes), world, self._pipeline.steps_per_epoch
        )
        self.train_state.wrap()
        self.train_state.model.train()
        self._batches = endless(self._pipeline)
        self._step = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            with torch.profiler.record_function("dl2pa.data"):
                batch = next(self._batches)
            self.train_state.step(batch, self._step)
            self._step += 1

    @property
    def steps_per_epoch(self) -> int:
        """Of CIFAR or of ImageNet."""
        return IMAGES[BACKBONES[self._config.model.backbone].small] // self._config.train.batch_size

    def more(self, step_s: float, ceilings: dict[str, dict[str, Any]]) -> dict[str, Any]:
        method_s, match_s = self._method_seconds()
        per_epoch = self.steps_per_epoch
        row = {
            "parts": self._parts(),
            "method_ms": method_s * 1e3,
            "match_ms": match_s * 1e3,
            "method_share": (method_s + match_s / per_epoch) / step_s,
            "epoch_s": per_epoch * step_s,
        }
        ceiling = ceilings[self._config.train.precision]["matmul_tflops"] * 1e12
        return {**row, "matmul_share": self._flops() / step_s / ceiling}

    def _parts(self) -> dict[str, float]:
        gpu = self._world.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
        with profile(activities=activities) as profiler:
            self.run(_PROFILED)
            wait(self._world.device)
        found: dict[str, float] = {}
        for event in profiler.key_averages():
            if event.key in PARTS:
                took = event.device_time_total if gpu else event.cpu_time_total
                name = event.key.removeprefix("dl2pa.") + "_ms"
                found[name] = max(found.get(name, 0.0), took / 1e3 / _PROFILED)
        return found

    def _method_seconds(self) -> tuple[float, float]:
        """Loss, gradient and statistic of one batch on features at hand; a matching."""
        method, device = self.train_state.model.method, self._world.device
        batch, dim = self._config.train.batch_size, method.dim
        labels = torch.arange(batch, device=device) % method.num_classes
        features = torch.randn(batch, dim, device=device, requires_grad=True)
        targets = Targets(labels)

        def once() -> None:
            with autocast(self._config.train.precision, device):
                loss = method.loss(features, targets)
            loss.backward()
            method.observe(features.detach(), targets)
            features.grad = None

        method_s = fastest(once, device)
        began = time.perf_counter()
        self.train_state.rematch()
        wait(device)
        return method_s, time.perf_counter() - began

    def _flops(self) -> float:
        side, device = self._config.data.image_size, self._world.device
        network = build_embedder(self._config.model.backbone, self._config.model.embedding_dim).to(device)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(2, 3, side, side, device=device)).sum().backward()
        return counter.get_total_flops() / 2 * self._config.train.batch_size

    def close(self) -> None:
        self._pipeline.close()


class Bare(Runner):
    """Forward, backward and optimizer of the network alone, on one batch that stays where it is."""

    def __init__(self, config: Config, world: World) -> None:
        self._precision, self._device = config.train.precision, world.device
        layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
        network = build_embedder(config.model.backbone, config.model.embedding_dim)
        self._network = network.to(world.device, memory_format=layout)  # pyright: ignore[reportCallIssue]
        self._optimizer = build_optimizer(self._network, config.optim, fused=world.device.type == "cuda")
        if config.train.compile:
            self._network.compile(mode=compile_mode(config.train.compile))
        side = config.data.image_size
        images = torch.randn(config.train.batch_size, 3, side, side, device=world.device)
        self._images = images.contiguous(memory_format=layout)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            with autocast(self._precision, self._device):
                loss = self._network(self._images).float().square().mean()
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)


class Plain(Runner):
    """The reference loop."""

    def __init__(self, config: Config, world: World) -> None:
        resident = config.data.loader == "resident"
        dataset = noise_set(config) if resident else None
        root = Path(config.data.root) if config.data.root and not resident else None
        self._loop = ReferenceLoop(config, world.device, dataset, root)

    def run(self, steps: int) -> None:
        self._loop.run(steps)

    def close(self) -> None:
        self._loop.close()


def noise_set(config: Config) -> ArrayDataset:
    """As many noise images as CIFAR has."""
    generator = np.random.default_rng(0)
    side, count = config.data.image_size, IMAGES[True]
    images = generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    labels = generator.integers(0, 100, count)
    return ArrayDataset(images, labels, tuple(str(c) for c in range(100)), "noise")


def fastest(function: Callable[[], Tensor | None], device: torch.device, times: int = 10) -> float:
    """Seconds, the fastest of several."""
    best = float("inf")
    for _ in range(times):
        wait(device)
        began = time.perf_counter()
        function()
        wait(device)
        best = min(best, time.perf_counter() - began)
    return best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
