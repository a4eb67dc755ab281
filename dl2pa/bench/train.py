"""Time of the parts of a training step, compared with the network only and with a plain training loop."""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dl2pa.bench import FILE_LOADERS, check_loader
from dl2pa.bench.runners import (
    RESIDENT_DATA,
    Compile,
    NetworkRunner,
    ReferenceRunner,
    Runner,
    TrainStateRunner,
    fastest,
    synchronize,
    synthetic_config,
)
from dl2pa.config import Config
from dl2pa.specs import IMAGE_FOLDER
from dl2pa.training.distributed import World

_WARM_UP = 3
_DISCARDED = 4
"""Steps before each timed block, which use up what was prefetched during other turns."""
_PAYLOAD = 2**28
"""Bytes of the copies that measure memory bandwidth."""


@dataclass(frozen=True)
class Variant:
    """Backbone and training settings to measure."""

    model: str
    loader: str
    precision: str
    channels_last: bool
    compile: Compile

    @property
    def source(self) -> str:
        """Kind of images."""
        return "files" if self.loader in FILE_LOADERS else self.loader

    @property
    def name(self) -> str:
        layout = "nhwc" if self.channels_last else "nchw"
        compiled = "graphs" if self.compile == "graphs" else "compiled" if self.compile else ""
        parts = [self.model, self.loader, self.precision, layout, compiled]
        return " ".join(part for part in parts if part)

    @property
    def bare_name(self) -> str:
        return f"bare {self.name.replace(self.loader + ' ', '')}"

    @property
    def reference_name(self) -> str:
        return f"reference {self.model} {self.source} {self.precision}"


@dataclass(frozen=True)
class TrainOptions:
    """Options of the benchmark; it measures every combination of the lists."""

    models: list[str]
    loaders: list[str]
    precisions: list[str]
    channels_last: list[bool]
    compile: list[Compile]
    batch_size: int
    steps: int
    root: Path | None = None
    image_size: int | None = None


def bench_train(
    options: TrainOptions, rounds: int, world: World
) -> tuple[dict[str, float], list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure each model's variants, the network only and the plain loop, in turn in every round.

    Every ceiling, turn and row is also written to standard error when it is measured, one JSON object per line, so that
    a benchmark that is killed leaves what it has measured.

    A turn is `steps` steps after a few discarded ones. *Bare* is the same network, precision and layout without method,
    data or metrics: forward, mean square of the embedding as loss, backward, optimizer. *Reference* is
    `dl2pa.bench.reference.ReferenceLoop`.

    Returns:
        Ratios (median over rounds of the ratio within a round) of each variant and, under short names, of the first
        one: `method_share ours/plain_loop`, and of the throughput with different data,
        `dali/synthetic dali/torchvision resident/synthetic`; rows of `name batch step_ms images_per_second parts
        method_share method_ms match_ms matmul_share epoch_s` per variant, and rows of the baselines. `parts`:
        milliseconds per part of a step (GPU: between CUDA events; CPU: with profiler overhead); `loss` is part of
        `forward`. `method_share`: loss,
        its gradient, statistic, and an assignment update per epoch of CIFAR or ImageNet, divided by the step time; the
        cost of a linear classifier is not subtracted. `matmul_share`: FLOP/s of the network divided by those of a large
        matrix product in that precision.

    Raises:
        UserError: an unknown or unsuitable model, loader or precision.
    """
    ratios: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    configs = {model: _configs(options, model) for model in options.models}
    ceilings = [_ceiling(world.device, precision) for precision in dict.fromkeys(options.precisions)]
    by_precision = {ceiling["precision"]: ceiling for ceiling in ceilings}
    for model in options.models:
        model_ratios, model_rows = _bench_model(options, configs[model], rounds, world, by_precision)
        ratios = model_ratios | ratios  # short names refer to the first model
        rows += model_rows
    return ratios, rows, ceilings


def _configs(options: TrainOptions, model: str) -> dict[Variant, Config]:
    lists = options.loaders, options.precisions, options.channels_last, options.compile
    variants = [Variant(model, *values) for values in itertools.product(*lists)]
    return {variant: _config(options, variant) for variant in variants}


def _bench_model(
    options: TrainOptions,
    configs: dict[Variant, Config],
    rounds: int,
    world: World,
    ceilings: dict[str, dict[str, Any]],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    variants, batch_size = list(configs), options.batch_size
    runners: dict[str, Runner] = {}
    try:
        for variant, config in configs.items():
            runners[variant.name] = TrainStateRunner(config, world)
        for variant, config in configs.items():
            if variant.bare_name not in runners:
                runners[variant.bare_name] = NetworkRunner(config, world)
            if variant.reference_name not in runners:
                runners[variant.reference_name] = ReferenceRunner(config, world)
        times = _measure_in_turn(runners, options.steps, rounds, world.device)
        rows, ratios = [], {}
        for name, runner in runners.items():
            step = statistics.median(times[name])
            row = {"name": name, "batch": batch_size, "step_ms": step * 1e3}
            row = {**row, "images_per_second": batch_size / step, **runner.details(step, ceilings)}
            rows.append(write_row(row))
        for variant in variants:
            name = variant.name
            ratios[f"step/bare: {name}"] = _median_ratio(times[name], times[variant.bare_name])
            ratios[f"speed/reference: {name}"] = _median_ratio(times[variant.reference_name], times[name])
        ratios["ours/plain_loop"] = ratios[f"speed/reference: {variants[0].name}"]
        ratios["method_share"] = next(row["method_share"] for row in rows if "method_share" in row)
        return ratios | _loader_ratios(variants, times), rows
    finally:
        for runner in runners.values():
            runner.close()
        runners.clear()
        gc.collect()


def _loader_ratios(variants: list[Variant], times: dict[str, list[float]]) -> dict[str, float]:
    """Return throughput ratios between data loaders, of the first variant that was measured with both."""
    ratios: dict[str, float] = {}
    for variant in variants:
        for one, other in (("dali", "synthetic"), ("dali", "torchvision"), ("resident", "synthetic")):
            other_name = replace(variant, loader=other).name
            if variant.loader == one and other_name in times and f"{one}/{other}" not in ratios:
                ratios[f"{one}/{other}"] = _median_ratio(times[other_name], times[variant.name])
    return ratios


def _median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _config(options: TrainOptions, variant: Variant) -> Config:
    check_loader(variant.loader, variant.model, options.root)
    data: dict[str, Any] = {}
    if variant.source == "files":
        source = {"dataset": IMAGE_FOLDER, "root": str(options.root)}
        data = {**source, "loader": variant.loader, "num_classes": None}
    elif variant.loader == "resident":
        data = RESIDENT_DATA
    if options.image_size is not None:
        data = {**data, "image_size": options.image_size}
    train = {key: getattr(variant, key) for key in ("precision", "channels_last", "compile")}
    return synthetic_config(variant.model, options.batch_size, data, train)


def _measure_in_turn(
    runners: dict[str, Runner], steps: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds per step of each runner in each round."""
    for name, runner in runners.items():
        start = time.perf_counter()
        runner.run(_WARM_UP)
        synchronize(device)
        write_row({"name": name, "warm_up_s": time.perf_counter() - start})
    times: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(rounds):
        for name, runner in runners.items():
            runner.run(_DISCARDED)
            synchronize(device)
            start = time.perf_counter()
            runner.run(steps)
            synchronize(device)
            times[name].append((time.perf_counter() - start) / steps)
            write_row({"name": name, "round": number, "step_ms": times[name][-1] * 1e3})
    return times


def write_row(row: dict[str, Any]) -> dict[str, Any]:
    """Write a measurement to standard error as one line of JSON, at once; return it."""
    sys.stderr.write(json.dumps(row) + "\n")
    sys.stderr.flush()
    return row


def _ceiling(device: torch.device, precision: str) -> dict[str, Any]:
    """Measure the device's speed in a large matrix product, a large copy, and a copy from the host."""
    gpu = device.type == "cuda"
    side = 8192 if gpu else 1024
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a = torch.randn(side, side, device=device).to(dtype)
    matmul_s = fastest(lambda: a @ a, device)
    source = torch.empty(_PAYLOAD, dtype=torch.uint8, device=device)
    copy_s = fastest(source.clone, device)
    row = {
        "precision": precision,
        "matmul_tflops": 2 * side**3 / matmul_s / 1e12,
        "copy_gb_per_s": 2 * _PAYLOAD / copy_s / 1e9,
    }
    if gpu:
        host = torch.empty(_PAYLOAD, dtype=torch.uint8, pin_memory=True)
        row["host_to_device_gb_per_s"] = _PAYLOAD / fastest(lambda: host.to(device), device) / 1e9
    return write_row(row)
