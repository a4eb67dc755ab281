"""Where the time of a training step goes, beside the bare network and a plain training loop, all in one run."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dl2pa.bench.runners import Bare, Compile, Ours, Plain, Runner, fastest, synthetic_config, wait
from dl2pa.config import Config
from dl2pa.errors import UserError
from dl2pa.specs import BACKBONES, CIFAR100, IMAGE_FOLDER
from dl2pa.training.distributed import World

LOADERS = ("synthetic", "resident", "dali", "torchvision")
PRECISIONS = ("fp32", "bf16", "fp16")

_WARM_UP = 3
_DISCARDED = 4
"""Steps before each timed block: what was read ahead while others had their turn is used up."""
_PAYLOAD = 2**28
"""Bytes of the copy that measures a device."""


@dataclass(frozen=True)
class Variant:
    """One way to train one network."""

    model: str
    loader: str
    precision: str
    channels_last: bool
    compile: Compile

    @property
    def source(self) -> str:
        """What the images are made of."""
        return "files" if self.loader in ("dali", "torchvision") else self.loader

    @property
    def name(self) -> str:
        layout = "nhwc" if self.channels_last else "nchw"
        compiled = "graphs" if self.compile == "graphs" else "compiled" if self.compile else ""
        parts = [self.model, self.loader, self.precision, layout, compiled]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Choices:
    """What to measure: every combination of the lists."""

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
    choices: Choices, rounds: int, world: World
) -> tuple[dict[str, float], list[dict[str, Any]], list[dict[str, Any]]]:
    """Each model's variants, the bare network and the plain loop, by turns in every round.

    A turn is `steps` steps after a few discarded ones. *Bare* is the same network, precision and layout without method,
    data or metrics: forward, the mean square of the embedding as loss, backward, optimizer. The *reference* loop is
    `dl2pa.bench.reference.ReferenceLoop`.

    Returns:
        Ratios (medians over the rounds of the ratio within a round) of each variant and, under short names, of the
        first one: `method_share ours/plain_loop`, and speeds of a network by where its data comes from,
        `dali/synthetic dali/torchvision resident/synthetic`; rows of `name batch step_ms images_per_second parts
        method_share method_ms match_ms matmul_share epoch_s`, one a variant, and the yardsticks' rows. `parts`:
        milliseconds of each part of a step, by the profiler and with its own cost; `loss` lies within `forward`.
        `method_share`: loss, its gradient, the statistic, and a matching divided over an epoch of CIFAR or ImageNet,
        over the step; the classifier that they replace is not taken off.
        `matmul_share`: the network's arithmetic over what a large product of matrices reaches in that precision.

    Raises:
        UserError: a model, a loader or a precision that does not exist or does not fit.
    """
    ratios: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    configs = {model: _configs(choices, model) for model in choices.models}
    ceilings = [_ceiling(world.device, precision) for precision in dict.fromkeys(choices.precisions)]
    for model in choices.models:
        found = _bench_model(choices, configs[model], rounds, world, {c["precision"]: c for c in ceilings})
        ratios = found[0] | ratios  # the short names are those of the first model
        rows += found[1]
    return ratios, rows, ceilings


def _configs(choices: Choices, model: str) -> dict[Variant, Config]:
    lists = choices.loaders, choices.precisions, choices.channels_last, choices.compile
    variants = [Variant(model, *one) for one in itertools.product(*lists)]
    return {variant: _config(choices, variant) for variant in variants}


def _bench_model(
    choices: Choices,
    configs: dict[Variant, Config],
    rounds: int,
    world: World,
    ceilings: dict[str, dict[str, Any]],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    variants = list(configs)
    runners: dict[str, Runner] = {}
    try:
        for variant, config in configs.items():
            runners[variant.name] = Ours(config, world)
        for variant, config in configs.items():
            bare = f"bare {variant.name.replace(variant.loader + ' ', '')}"
            if bare not in runners:
                runners[bare] = Bare(config, world)
            plain = f"reference {variant.model} {variant.source} {variant.precision}"
            if plain not in runners:
                runners[plain] = Plain(config, world)
        times = _by_turns(runners, choices.steps, rounds, world.device)
        rows, ratios = [], {}
        for name, runner in runners.items():
            step = statistics.median(times[name])
            row = {"name": name, "batch": choices.batch_size, "step_ms": step * 1e3}
            rows.append(
                {**row, "images_per_second": choices.batch_size / step, **runner.more(step, ceilings)}
            )
        for variant in variants:
            mine = times[variant.name]
            for kind in ("bare", "reference"):
                other = next(n for n in runners if n.startswith(kind) and _belongs(n, variant))
                pairs = zip(mine, times[other], strict=True)
                key = f"step/bare: {variant.name}" if kind == "bare" else f"speed/reference: {variant.name}"
                values = [a / b if kind == "bare" else b / a for a, b in pairs]
                ratios[key] = statistics.median(values)
        ratios["ours/plain_loop"] = ratios[f"speed/reference: {variants[0].name}"]
        ratios["method_share"] = next(row["method_share"] for row in rows if "method_share" in row)
        return ratios | _between_loaders(variants, times), rows
    finally:
        for runner in runners.values():
            runner.close()
        runners.clear()
        gc.collect()


def _between_loaders(variants: list[Variant], times: dict[str, list[float]]) -> dict[str, float]:
    """Speeds from one source of data over those from another, of the first variant that has both."""
    ratios: dict[str, float] = {}
    for variant in variants:
        for one, other in (("dali", "synthetic"), ("dali", "torchvision"), ("resident", "synthetic")):
            beside = replace(variant, loader=other).name
            if variant.loader == one and beside in times and f"{one}/{other}" not in ratios:
                pairs = zip(times[variant.name], times[beside], strict=True)
                ratios[f"{one}/{other}"] = statistics.median(b / a for a, b in pairs)
    return ratios


def _belongs(yardstick: str, variant: Variant) -> bool:
    if yardstick.startswith("bare"):
        return yardstick == f"bare {variant.name.replace(variant.loader + ' ', '')}"
    return yardstick == f"reference {variant.model} {variant.source} {variant.precision}"


def _config(choices: Choices, variant: Variant) -> Config:
    if variant.loader == "resident" and not BACKBONES[variant.model].small:
        remedy = "Use synthetic, dali or torchvision."
        raise UserError("--loaders", variant.loader, f"is not for {variant.model}", remedy)
    if variant.source == "files" and choices.root is None:
        raise UserError(
            "--data", None, f"is needed for {variant.loader}", "Give a folder with train/ and val/."
        )
    data: dict[str, Any] = {}
    if variant.source == "files":
        data = {
            "dataset": IMAGE_FOLDER,
            "root": str(choices.root),
            "loader": variant.loader,
            "num_classes": None,
        }
    elif variant.loader == "resident":
        data = {"dataset": CIFAR100, "root": "/", "loader": "resident", "crop": "pad"}
    size = {} if choices.image_size is None else {"image_size": choices.image_size}
    return synthetic_config(
        variant.model,
        choices.batch_size,
        {**data, **size},
        {
            "precision": variant.precision,
            "channels_last": variant.channels_last,
            "compile": variant.compile,
        },
    )


def _by_turns(
    runners: dict[str, Runner], steps: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds a step: one number a round and runner."""
    for runner in runners.values():
        runner.run(_WARM_UP)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            runner.run(_DISCARDED)
            wait(device)
            began = time.perf_counter()
            runner.run(steps)
            wait(device)
            times[name].append((time.perf_counter() - began) / steps)
    return times


def _ceiling(device: torch.device, precision: str) -> dict[str, Any]:
    """What the device reaches at its best: a large product of matrices, a large copy, a copy from the host."""
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
    return row
