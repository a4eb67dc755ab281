"""Training steps measured by `dl2pa bench`: those of dl2pa and the baselines."""

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

from dl2pa.bench.loaders import iterate_epochs
from dl2pa.bench.reference import ReferenceLoop
from dl2pa.config import Config, parse_config
from dl2pa.methods import Targets
from dl2pa.model.model import build_configured_embedder, build_model
from dl2pa.specs import CIFAR100, DATASETS, SYNTHETIC, backbone_spec
from dl2pa.step_parts import PARTS, Event, EventRanges, part, ranges_from
from dl2pa.training.data import build_train_pipeline, open_split
from dl2pa.training.distributed import World
from dl2pa.training.negatives import with_negatives
from dl2pa.training.optim import build_optimizer
from dl2pa.training.train_state import TrainState, autocast, compile_mode
from pipelines.datasets.arrays import ArrayDataset

Compile = bool | Literal["graphs"]
"""Values of `train.compile`."""
IMAGES = {True: 50_000, False: 1_281_167}
"""Training images of CIFAR (small backbones) and ImageNet-1K, for the steps per epoch."""
RESIDENT_DATA = {"dataset": CIFAR100, "root": "/", "loader": "resident", "crop": "pad"}
"""Section `data` of CIFAR images on the device; ``noise_dataset`` replaces the files."""
_PROFILED = 5


def synthetic_config(
    model: str, batch_size: int, data: dict[str, Any] | None = None, train: dict[str, Any] | None = None
) -> Config:
    """Return a configuration with synthetic images of CIFAR's or ImageNet's size, updated by `data` and `train`."""
    spec = backbone_spec(model)
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
    """Return a configuration with `RESIDENT_DATA`."""
    return synthetic_config(model, batch_size, RESIDENT_DATA, train)


class Runner(ABC):
    """A training loop to measure."""

    @abstractmethod
    def run(self, steps: int) -> None:
        """Train for `steps` steps."""

    def details(self, step_s: float, ceilings: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return additional columns of the row."""
        return {}

    def close(self) -> None:  # noqa: B027
        """Stop threads and processes."""


class TrainStateRunner(Runner):
    """Training step and data pipeline of dl2pa."""

    def __init__(self, config: Config, world: World) -> None:
        self._config, self._world = config, world
        dataset = noise_dataset(config) if config.data.loader == "resident" else open_split(config, "train")
        self._pipeline = build_train_pipeline(config, dataset, world)
        classes = len(dataset.classes)
        self.train_state = TrainState(
            config, build_model(config, classes), world, self._pipeline.steps_per_epoch
        )
        self.train_state.wrap()
        self.train_state.model.train()
        self._batches = iterate_epochs(self._pipeline)
        self._step = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            with part("dl2pa.data"):
                batch = next(self._batches)
            self.train_state.step(batch, self._step)
            self._step += 1

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch of CIFAR or ImageNet."""
        return IMAGES[backbone_spec(self._config.model.backbone).small] // self._config.train.batch_size

    def details(self, step_s: float, ceilings: dict[str, dict[str, Any]]) -> dict[str, Any]:
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
        """Return the milliseconds of each part of a step."""
        gpu = self._world.device.type == "cuda"
        times = self.event_times(_new_cuda_event) if gpu else self._profiled_times()
        return {f"{name.removeprefix('dl2pa.')}_ms": time / _PROFILED for name, time in times.items()}

    def event_times(self, new_event: Callable[[], Event]) -> dict[str, float]:
        """Milliseconds of the parts of several steps, between events on the stream of the device."""
        ranges = EventRanges(new_event)
        with ranges_from(ranges):
            self.run(_PROFILED)
        synchronize(self._world.device)
        return ranges.milliseconds()

    def _profiled_times(self) -> dict[str, float]:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            self.run(_PROFILED)
        averages = profiler.key_averages()
        return {event.key: event.cpu_time_total / 1e3 for event in averages if event.key in PARTS}

    def _method_seconds(self) -> tuple[float, float]:
        """Return the time of loss, gradient and statistic for given features, and of an assignment update."""
        method, device = self.train_state.model.method, self._world.device
        batch, dim = self._config.train.batch_size, method.dim
        labels = torch.arange(batch, device=device) % method.num_classes
        features = torch.randn(batch, dim, device=device, requires_grad=True)
        targets = with_negatives(method, Targets(labels), self._config.train.seed, 0)

        def method_step() -> None:
            with autocast(self._config.train.precision, device):
                loss = method.loss(features, targets)
            loss.backward()
            method.observe(features.detach(), targets)
            features.grad = None

        method_s = fastest(method_step, device)
        start = time.perf_counter()
        self.train_state.rematch()
        synchronize(device)
        return method_s, time.perf_counter() - start

    def _flops(self) -> float:
        side, device = self._config.data.image_size, self._world.device
        network = build_configured_embedder(self._config).to(device)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(2, 3, side, side, device=device)).sum().backward()
        return counter.get_total_flops() / 2 * self._config.train.batch_size

    def close(self) -> None:
        self._pipeline.close()


class NetworkRunner(Runner):
    """Forward, backward and optimizer of the network only, on a fixed batch."""

    def __init__(self, config: Config, world: World) -> None:
        self._precision, self._device = config.train.precision, world.device
        layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
        network = build_configured_embedder(config)
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


class ReferenceRunner(Runner):
    """The reference loop."""

    def __init__(self, config: Config, world: World) -> None:
        resident = config.data.loader == "resident"
        dataset = noise_dataset(config) if resident else None
        root = Path(config.data.root) if config.data.root and not resident else None
        self._loop = ReferenceLoop(config, world.device, dataset, root)

    def run(self, steps: int) -> None:
        self._loop.run(steps)

    def close(self) -> None:
        self._loop.close()


def _new_cuda_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def noise_dataset(config: Config) -> ArrayDataset:
    """Return a data set of random images of CIFAR's size."""
    generator = np.random.default_rng(0)
    side, count = config.data.image_size, IMAGES[True]
    images = generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    labels = generator.integers(0, 100, count)
    return ArrayDataset(images, labels, tuple(str(c) for c in range(100)), "noise")


def fastest(function: Callable[[], Tensor | None], device: torch.device, times: int = 10) -> float:
    """Return the seconds of the fastest of several calls."""
    best = float("inf")
    for _ in range(times):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
