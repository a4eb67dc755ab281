"""What makes two runs runs of the same recipe, and a recipe in a few words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from dl2pa.config import Config, flatten
from dl2pa.config.load import PLACES

SEED = "train.seed"
NEUTRAL = (
    "train.log_every_steps",
    "train.eval_batch_size",
    "train.compile",
    "train.deterministic",
    "train.channels_last",
)
"""Keys that say how a result is computed or watched, not what is computed."""
_LENGTH = ("train.epochs", "train.max_steps")
_SCALES_WITH_LENGTH = ("optim.milestones", "optim.warmup_epochs")

Identity = dict[str, Any]
Length = Literal["full", "short", "other"]
"""How long a run is beside another: as long, shorter, or neither."""


def identity_of(config: Config) -> Identity:
    """The configuration without its seed, its places and what changes no result; a default as what it stands for."""
    flat = flatten(config)
    of_method = getattr(config, "method_defaults", None)  # what a method chooses where nothing is given
    for key, value in flat.items():
        name = key.rpartition(".")[2]
        if isinstance(getattr(Config, name, None), property):
            flat[key] = getattr(config, name)
        elif value is None and key.startswith("method."):
            flat[key] = getattr(of_method, name, None)
    return {k: v for k, v in flat.items() if k != SEED and not k.startswith((*PLACES, *NEUTRAL))}


def group_name(config: Config) -> str:
    """A name that runs of one recipe share, whatever their seed: method, d, data set and six hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(identity_of(config), sort_keys=True, default=str).encode()).hexdigest()
    return f"{config.method.name} d={config.model.embedding_dim} {config.data.dataset} {digest[:6]}"


def run_title(config: Config, stem: str) -> str:
    """A run's name in MLflow where none is given: it tells the runs of a sweep apart.

    Args:
        stem: of the configuration's file.
    """
    return f"{stem} {config.method.name} seed {config.train.seed}"


def differing(one: Identity, other: Identity) -> set[str]:
    """Keys whose values differ."""
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def length_beside(run: Identity, epochs_done: int, cell: Identity, free: tuple[str, ...]) -> Length | None:
    """How long a run is beside a cell whose recipe it follows; None where it follows another recipe.

    A shorter run may have the epochs of its schedule shortened with it: as many milestones, a warm-up still.

    Args:
        epochs_done: epochs the run has trained.
        free: keys in which a run of the cell may differ.
    """
    keys = differing(run, cell) - set(free)
    if not keys:
        return "full"
    length: Length = "short" if epochs_done < cell["train.epochs"] else "other"
    rest = keys - set(_LENGTH)
    if not rest:
        return length
    if length == "short" and all(k in _SCALES_WITH_LENGTH and _is_scaled(run[k], cell[k]) for k in rest):
        return "short"
    return None


def _is_scaled(run: Any, cell: Any) -> bool:
    if isinstance(cell, list):
        return isinstance(run, list) and len(run) == len(cell)
    return bool(run) and bool(cell)


def describe(recipe: Identity, *, beside: Sequence[Identity] = ()) -> str:
    """Loss, assignment, optimizer, schedule and length in a line.

    Args:
        beside: recipes from which this one has to be told apart: keys that the line would leave out are added
            where their values differ.
    """
    loss = str(recipe["method.loss"])
    if loss == "cross_entropy":
        linear = recipe["method.name"] == "psc" and not recipe["method.normalize"]
        scale, smoothing = recipe["method.scale"], recipe["method.label_smoothing"]
        scaled = scale and recipe["method.name"] != "dnc"
        loss += " (linear)" if linear else f" at scale {scale:.4g}" if scaled else ""
        loss += f", smoothing {smoothing:g}" if smoothing else ""
    parts = [f"{loss}, {recipe['method.assignment']}"]
    if recipe["method.prototypes"] != "auto":
        parts.append(f"prototypes {recipe['method.prototypes']}")
    if recipe["method.class_vectors"] is not None:
        parts.append(f"class vectors {recipe['method.class_vectors']}")
    rates = f"{recipe['optim.name']} {recipe['optim.lr']:g}, decay {recipe['optim.weight_decay']:.3g}"
    parts.append(f"{rates}, {_schedule(recipe)}")
    parts.append(f"{recipe['train.epochs']} epochs, batch {recipe['train.batch_size']}")
    extras = [f"{k} {recipe[f'train.{k}']:g}" for k in ("mixup", "cutmix", "ema") if recipe[f"train.{k}"]]
    if recipe["train.precision"] != "fp32":
        extras.append(recipe["train.precision"])
    differ = sorted(set().union(*(differing(recipe, other) for other in beside)) - set(_DESCRIBED))
    extras += [f"{key}={_plain(recipe.get(key))}" for key in differ]
    return "; ".join([*parts, *([", ".join(extras)] if extras else [])])


_DESCRIBED = (
    *("data.dataset", "data.imbalance", "model.backbone", "model.embedding_dim", "method.name"),
    *("method.loss", "method.normalize", "method.scale", "method.label_smoothing", "method.assignment"),
    *("method.prototypes", "method.class_vectors", "optim.name", "optim.lr", "optim.weight_decay"),
    *("optim.schedule", "optim.warmup_epochs", "optim.gamma", "optim.milestones", "train.epochs"),
    *("train.max_steps", "train.batch_size", "train.mixup", "train.cutmix", "train.ema", "train.precision"),
)
"""Keys that ``describe``, or a table's other columns, speak of."""


def _schedule(recipe: Identity) -> str:
    warmup = f"warm-up {recipe['optim.warmup_epochs']:g}, " if recipe["optim.warmup_epochs"] else ""
    if recipe["optim.schedule"] != "step":
        return f"{warmup}{recipe['optim.schedule']}"
    milestones = ", ".join(str(m) for m in recipe["optim.milestones"])
    return f"{warmup}×{recipe['optim.gamma']:g} after {milestones or 'none'}"


def _plain(value: Any) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
