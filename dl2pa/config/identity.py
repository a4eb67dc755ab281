"""Identity of a run: which runs share a recipe, and which checkpoints a configuration may resume."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dl2pa.config import Config, flatten
from dl2pa.config.load import LOCAL_KEYS, with_current_names, without_added
from dl2pa.errors import UserError

log = logging.getLogger(__name__)

SEED = "train.seed"
NEUTRAL = (
    "train.log_every_steps",
    "train.eval_batch_size",
    "train.compile",
    "train.deterministic",
    "train.channels_last",
    "train.checkpoint_activations",
)
"""Keys that do not affect the result."""
_LENGTH = ("train.epochs", "train.max_steps")
_SCALES_WITH_LENGTH = ("optim.milestones", "optim.warmup_epochs")
_CHANGEABLE = (
    "optim.",
    "train.epochs",
    "train.max_steps",
    "train.patience",
    "train.log_every_steps",
    "train.eval_every_epochs",
    "train.eval_batch_size",
    "train.accumulate",
    "train.checkpoint_activations",
    "train.precision",
    "train.compile",
    "train.deterministic",
    "train.channels_last",
    "train.ema",
    "method.match.",
    "data.threads",
    "data.max_bad_fraction",
    "data.loader",
)
"""Prefixes of keys that may change between two attempts of a run, with a warning."""
_NOT_CHANGEABLE = (
    *("optim.name", "optim.decay_all", "optim.layer_decay", "optim.head_lr_scale"),
    *("method.match.warmup_epochs", "method.match.statistic"),
)
"""Exceptions to ``_CHANGEABLE``."""

Identity = dict[str, Any]
Length = Literal["full", "short", "other"]
"""Length of a run relative to a published one: equal, shorter, or neither."""


def run_identity(config: Config, epochs_done: int | None = None) -> Identity:
    """Flat configuration of a recipe: without seed, paths, resources and keys that do not affect the result.

    Values that default to the method's choice are resolved.

    Args:
        epochs_done: trained epochs. If they are all epochs, `train.max_steps` was not reached and is ignored.
    """
    flat = flatten(config)
    for key, value in flat.items():
        name = key.rpartition(".")[2]
        if isinstance(getattr(Config, name, None), property):
            flat[key] = getattr(config, name)
        elif value is None and key.startswith("method."):
            flat[key] = getattr(config.method_defaults, name, None)
    if epochs_done is not None and epochs_done >= config.train.epochs:
        flat["train.max_steps"] = None
    return {k: v for k, v in flat.items() if k != SEED and not k.startswith((*LOCAL_KEYS, *NEUTRAL))}


def checkpoint_identity(config: Config) -> Identity:
    """Flat configuration stored in a checkpoint: without paths, resources and tracking."""
    return {k: v for k, v in flatten(config).items() if not k.startswith(LOCAL_KEYS)}


def data_identity(fingerprint: str, classes: Sequence[str]) -> Identity:
    """Identity of an open data set: its fingerprint, and number and digest of the class names in their order."""
    digest = hashlib.sha256(json.dumps(tuple(classes)).encode()).hexdigest()[:8]
    return {"data.fingerprint": fingerprint, "data.classes": f"{len(classes)} classes, {digest}"}


def check_resumable(before: Mapping[str, Any], now: Identity, *, quiet: bool = False) -> None:
    """Compare the identity in a checkpoint with the current one; log changes that are allowed.

    Args:
        quiet: do not log them: the training that follows does.

    Raises:
        UserError: a change that is not allowed, with the key and both values.
    """
    # Older checkpoints lack newer keys, which had their default, and contain former names.
    before = {**checkpoint_identity(Config()), **with_current_names(before)}
    # The data fingerprint comes last: the key that changed it gives a clearer message.
    for key in sorted(differing(before, now), key=lambda key: (key == "data.fingerprint", key)):
        old, new = before.get(key), now.get(key)
        if key.startswith(_CHANGEABLE) and key not in _NOT_CHANGEABLE:
            level = logging.DEBUG if quiet else logging.WARNING
            log.log(level, "%s changed from %s to %s; training continues with the new value", key, old, new)
            continue
        remedy = "Use another --run-dir for a new run, or restore the old value."
        if key == "data.fingerprint":
            message = "the images differ from those this run was started with"
            raise UserError("data.root", new, message, remedy)
        raise UserError(key, new, f"this run was started with {old!r}", remedy)


RECIPE_TAG = "recipe"
"""Tag with the name of the configuration file."""


def group_name(config: Config) -> str:
    """Name shared by all seeds of a recipe: method, d, data set and six hexadecimal digits."""
    digest = hashlib.sha256(
        json.dumps(without_added(run_identity(config)), sort_keys=True, default=str).encode()
    ).hexdigest()
    return f"{config.method.name} d={config.model.embedding_dim} {config.data.dataset} {digest[:6]}"


def run_title(config: Config, stem: str) -> str:
    """Default name of a run in MLflow; `stem` is that of the configuration file."""
    return f"{stem} {config.method.name} seed {config.train.seed}"


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """Keys whose values differ."""
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def relative_length(run: Identity, epochs_done: int, cell: Identity, free: tuple[str, ...]) -> Length | None:
    """Length of a run relative to a published one with the same recipe; None if the recipes differ.

    In a shorter run, the epochs of the schedule may be shortened too: same number of milestones, warm-up kept.

    Args:
        epochs_done: epochs the run has trained.
        cell: identity of the published run.
        free: keys that may differ.
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


def describe(recipe: Identity, *, among: Sequence[Identity] = ()) -> str:
    """Describe loss, assignment, optimizer, schedule and length in one line.

    Args:
        among: recipes to distinguish this one from; other keys with different values are appended.
    """
    loss = str(recipe["method.loss"])
    if loss in ("cross_entropy", "ntce"):
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
    scaling = recipe["optim.lr_scaling"]
    per_batch = "" if scaling == "none" else f" per 256 images ({scaling})"
    rates = (
        f"{recipe['optim.name']} {recipe['optim.lr']:g}{per_batch}, decay {recipe['optim.weight_decay']:.3g}"
    )
    parts.append(f"{rates}, {_schedule(recipe)}")
    parts.append(f"{recipe['train.epochs']} epochs, batch {recipe['train.batch_size']}")
    extras = [f"{k} {recipe[f'train.{k}']:g}" for k in ("mixup", "cutmix", "ema") if recipe[f"train.{k}"]]
    if recipe["train.precision"] != "fp32":
        extras.append(recipe["train.precision"])
    differ = sorted(set().union(*(differing(recipe, other) for other in among)) - set(_DESCRIBED))
    extras += [f"{key}={_plain(recipe.get(key))}" for key in differ]
    return "; ".join([*parts, *([", ".join(extras)] if extras else [])])


_DESCRIBED = (
    *("data.dataset", "data.imbalance", "model.backbone", "model.embedding_dim", "method.name"),
    *("method.loss", "method.normalize", "method.scale", "method.label_smoothing", "method.assignment"),
    *("method.prototypes", "method.class_vectors", "optim.name", "optim.lr", "optim.lr_scaling"),
    "optim.weight_decay",
    *("optim.schedule", "optim.warmup_epochs", "optim.gamma", "optim.milestones", "train.epochs"),
    *("train.max_steps", "train.batch_size", "train.mixup", "train.cutmix", "train.ema", "train.precision"),
)
"""Keys that appear in ``describe`` or in other columns of a table."""


def _schedule(recipe: Identity) -> str:
    warmup = f"warm-up {recipe['optim.warmup_epochs']:g}, " if recipe["optim.warmup_epochs"] else ""
    if recipe["optim.schedule"] != "step":
        return f"{warmup}{recipe['optim.schedule']}"
    milestones = ", ".join(str(m) for m in recipe["optim.milestones"])
    return f"{warmup}×{recipe['optim.gamma']:g} after {milestones or 'none'}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
