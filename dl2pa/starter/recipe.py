"""Recipe for a data set, a network and a machine: values of configuration keys, each with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dl2pa import zoo
from dl2pa.specs import backbone_spec
from dl2pa.starter.network import Network
from dl2pa.starter.survey import Survey

MAX_DIM = 512
"""Largest embedding dimension that is chosen."""
MIN_DIM = 2
"""In one dimension a unit vector is 1 or -1, and no gradient leads from one to the other."""
_CPU_SECONDS = 360
"""Training time on a CPU that the number of epochs is chosen for."""
_CPU_RATES = {
    "mobilenet_v3_large": 6.0,
    "efficientnet_lite0": 3.0,
    "efficientnet_b0": 3.0,
    "resnet18": 2.0,
    "resnet20": 25.0,
    "resnet8": 60.0,
}
"""Training images per second of one CPU core, roughly: CIFAR ResNets at 64 pixels, the others at 224."""
_SLOW_RATE = 1.0
"""The same for other networks."""
_FROZEN_COST = 1 / 3
"""Cost of a training image with a frozen backbone, which has no backward pass, relative to one without."""
_HEAD_STEPS = 100
"""Steps that train only a new head before the backbone is trained, too; otherwise the gradients of a random head
distort the pretrained features (Kumar et al., "Fine-Tuning can Distort Pretrained Features", ICLR 2022)."""
_LR = 1e-4
"""Peak learning rate of pretrained weights with AdamW at a batch of 32."""
_HEAD_SCALE = 70.0
"""Learning rate of a new head relative to that of the pretrained weights."""
_FEW_IMAGES = 10_000
"""Training images below which BatchNorm keeps the statistics of pretrained weights. A CPU always keeps them, because
its batches are small: their statistics alone cost several points of accuracy (docs/results.md)."""
_NORM_REASON = (
    "BatchNorm, if the network has any, keeps the statistics of the pretrained weights: those of small batches of "
    "random crops do not suit validation."
)
_HEAD_FIRST = "train only the new head, so that its first gradients do not distort the pretrained features."
_FREEZE_REASONS: dict[int | str, str] = {
    1: _HEAD_FIRST.replace("train", "The first epoch trains", 1),
    "all": "Only the head is trained.",
}
_SMALL_SIDE = 48
"""Images of this shorter side or less are trained at 32 pixels from random weights."""


@dataclass(frozen=True)
class Machine:
    """GPUs that training would use on this machine, and CPU cores."""

    gpus: int
    cores: int

    def __str__(self) -> str:
        return f"{self.gpus} GPU(s)" if self.gpus else f"{self.cores} CPU core(s), no GPU"


@dataclass
class Recipe:
    """Values of configuration keys by section, and reasons by `section.key`."""

    tree: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    reasons: dict[str, str] = field(default_factory=dict[str, str])

    def set(self, key: str, value: Any, reason: str = "") -> None:
        """Set `section.key`; the reason becomes its comment."""
        section, _, name = key.partition(".")
        self.tree.setdefault(section, {})[name] = value
        if reason:
            self.reasons[key] = reason


def choose_recipe(data: Survey, network: Network | None, machine: Machine) -> Recipe:
    """Choose every value.

    Args:
        network: None: a small network, chosen here, that starts from random weights.
    """
    recipe = Recipe()
    pretrained = network is not None and network.init is not None
    network = network or _small_network(data, machine)
    nproc, batch = _batch(data, machine, pretrained)
    size = _image_size(data, network, machine)
    epochs, frozen, note = _epochs(data, network, machine, batch if pretrained else None)
    _set_data(recipe, data, size, pretrained, network)
    _set_model(recipe, data, network, frozen, not machine.gpus or data.num_train < _FEW_IMAGES)
    _set_method(recipe, data, pretrained)
    _set_optim(recipe, batch, epochs, pretrained, frozen)
    _set_train(recipe, data, machine, batch, epochs, note, pretrained)
    recipe.set("tracking.experiment", data.folder.name or "images", "Name of the experiment in MLflow.")
    if nproc is not None:
        recipe.set("launch.nproc", nproc, "Too few images for several GPUs.")
    return recipe


def embedding_dim(num_classes: int) -> tuple[int, str]:
    """Embedding dimension for a number of classes, with the reason."""
    dim = max(MIN_DIM, min(num_classes - 1, MAX_DIM))
    if num_classes - 1 > MAX_DIM:
        return dim, (
            f"{num_classes:,} classes do not fit into {dim} dimensions as a regular simplex (it needs C - 1). The "
            "prototypes are the best known ones for this C and d, and which class gets which one is learned."
        )
    angle = math.degrees(math.acos(-1 / (num_classes - 1)))
    smallest = "the smallest that is trained" if num_classes == MIN_DIM else "C - 1"
    return dim, (
        f"{smallest}: the {num_classes} prototypes form a regular simplex, in which any two classes are "
        f"{angle:.1f} degrees apart, the widest arrangement in any number of dimensions."
    )


def _small_network(data: Survey, machine: Machine) -> Network:
    """A network for random weights."""
    if not machine.gpus or (data.short_side or _SMALL_SIDE + 1) <= _SMALL_SIDE:
        return Network({"backbone": "resnet8" if data.num_train < 2_000 else "resnet20"}, chosen=True)
    return Network({"backbone": "resnet18" if data.num_train < 100_000 else "resnet50"}, chosen=True)


def _image_size(data: Survey, network: Network, machine: Machine) -> int:
    if network.init is not None:
        large = network.chosen and not machine.gpus and data.num_train > 5_000
        return 160 if large else network.image_size or 224
    side = data.short_side or 256
    if backbone_spec(network.backbone).small:
        return 32 if side <= _SMALL_SIDE else 64
    return 224 if side >= 160 else 128


def _batch(data: Survey, machine: Machine, pretrained: bool) -> tuple[int | None, int]:
    """`launch.nproc`, None for its default, and a global batch that the processes divide."""
    each = (64 if pretrained else 128) if machine.gpus else 32
    processes = max(1, machine.gpus)
    # Fine-tuning of few images on a CPU has few epochs, so it needs more steps per epoch.
    steps = 24 if pretrained and not machine.gpus else 8
    most = min(each * processes, max(2, min(8, data.num_train // 8), data.num_train // steps))
    if most >= 4 * processes:
        return None, processes * _power_of_two(most // processes)
    return (1 if machine.gpus > 1 else None), min(_power_of_two(most), data.num_train)


def _power_of_two(limit: int) -> int:
    return 2 ** int(math.log2(limit))


def _epochs(
    data: Survey, network: Network, machine: Machine, batch: int | None
) -> tuple[int, int | str, str]:
    """`train.epochs`, `model.freeze_epochs` and the reason for the number of epochs.

    Args:
        batch: global batch of a fine-tuning; None: random weights.
    """
    count = data.num_train
    if machine.gpus:
        table = ((2_000, 30, 200), (20_000, 20, 120), (200_000, 15, 90), (math.inf, 10, 90))
        _, tuned, scratch = next(row for row in table if count < row[0])
        if batch is None:
            return scratch, 0, ""
        return tuned, _frozen_epochs(tuned, count, batch), "Pretrained weights need few epochs."
    name = network.backbone.removeprefix(zoo.TIMM).removeprefix("tf_")
    rate = _CPU_RATES.get(name, _SLOW_RATE) * machine.cores
    if batch is None:
        epochs = min(max(int(_CPU_SECONDS * rate / count), 10), 100)
        return epochs, 0, _cost(epochs * count / rate, machine)
    # In small data sets half of the epochs are frozen.
    epochs = min(max(int(_CPU_SECONDS * rate / count * 2 / (1 + _FROZEN_COST)), 3), 12)
    if epochs * count / rate > 10 * _CPU_SECONDS:
        return epochs, "all", _cost(epochs * count / rate * _FROZEN_COST, machine)
    frozen = _frozen_epochs(epochs, count, batch)
    return epochs, frozen, _cost((epochs - frozen * (1 - _FROZEN_COST)) * count / rate, machine)


def _frozen_epochs(epochs: int, count: int, batch: int) -> int:
    """Epochs that train only the new head: enough steps, at most half of all epochs, rounded up."""
    return min(-(-_HEAD_STEPS // max(1, count // batch)), -(-epochs // 2))


def _cost(seconds: float, machine: Machine) -> str:
    return f"Very roughly {_duration(seconds)} on this machine ({machine})."


def _duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def _escaped(path: str | Path) -> str:
    """A path in which a dollar sign does not begin the name of a variable."""
    return str(path).replace("$", "$$")


def _set_data(recipe: Recipe, data: Survey, size: int, pretrained: bool, network: Network) -> None:
    set_ = recipe.set
    set_("data.dataset", "imagefolder")
    set_("data.root", _escaped(data.layout.root))
    if data.layout.val_root is not None:
        set_("data.val_root", _escaped(data.layout.val_root))
    if data.val_fraction is not None:
        error = 100 * math.sqrt(0.9 * 0.1 / data.num_val)
        set_(
            "data.val_fraction",
            data.val_fraction,
            f"There is no validation folder: this fraction of each class, {data.num_val:,} images, is for validation, "
            f"the same in every run. An accuracy of 90 % has a standard error of {error:.1f} points.",
        )
    set_("data.num_classes", len(data.classes), "Training stops if the folder has another number of classes.")
    measured = (
        "" if data.short_side is None else f" The median shorter side of the images is {data.short_side}."
    )
    if pretrained:
        reason = "Side of the crops in pixels. Normalization and resizing follow the weights."
        if network.image_size is None:
            reason = (
                "Side of the crops in pixels. Set mean and std if the weights have others than ImageNet's."
            )
        set_("data.image_size", size, f"{reason}{measured}")
    else:
        set_("data.image_size", size, f"Side of the crops in pixels.{measured}")
        set_("data.eval_resize", size if size == 32 else round(size / 0.875))
    set_(
        "data.crop_scale",
        [0.35, 1.0] if pretrained else [0.25, 1.0],
        "Random crops show this fraction of an image.",
    )
    set_("data.flip", 0.5, "Set 0 if left and right differ in meaning, as in text.")
    if not pretrained:
        set_("data.trivial_augment", True, "Random weights need more augmentation.")
    if data.unreadable:
        found = f"{len(data.unreadable):,} of {data.num_inspected:,} inspected images cannot be read."
        train, val = (min(0.5, math.ceil(200 * fraction) / 100) for fraction in data.bad_fractions)
        set_("data.max_bad_fraction", train, f"{found} Lower both limits when they are repaired or removed.")
        set_("data.max_bad_val_fraction", val)


def _set_model(
    recipe: Recipe, data: Survey, network: Network, frozen: int | str, small_batches: bool
) -> None:
    dim, reason = embedding_dim(len(data.classes))
    recipe.set("model.backbone", network.backbone)
    for key, value in network.model.items():
        recipe.set(f"model.{key}", value)
    if network.init is not None:
        fetch = f" Fetch them once:\ndl2pa weights fetch {network.fetch}" if network.fetch else ""
        recipe.set("model.init", _escaped(network.init), f"Pretrained weights.{fetch}")
        recipe.set(
            "model.freeze_epochs",
            frozen,
            _FREEZE_REASONS.get(frozen, f"The first {frozen} epochs {_HEAD_FIRST}"),
        )
        if frozen != "all" and small_batches:
            recipe.set("model.freeze_norm", True, _NORM_REASON)
    recipe.set("model.embedding_dim", dim, reason)


def _set_method(recipe: Recipe, data: Survey, pretrained: bool) -> None:
    simplex = recipe.tree["model"]["embedding_dim"] >= len(data.classes) - 1
    recipe.set("method.name", "dl2pa")
    recipe.set("method.loss", "cross_entropy")
    if simplex:
        recipe.set("method.assignment", "static", "In a simplex every assignment of classes is equally good.")
    if not pretrained:
        recipe.set("method.label_smoothing", 0.1)
    if data.is_long_tailed:
        few, many = int(data.counts.min()), int(data.counts.max())
        reason = f"The classes have {few:,} to {many:,} training images; this keeps rare ones from being neglected."
        recipe.set("method.logit_adjustment", 1.0, reason)


def _set_optim(recipe: Recipe, batch: int, epochs: int, pretrained: bool, frozen: int | str) -> None:
    set_ = recipe.set
    set_("optim.name", "adamw")
    base, reference = (1e-3 if not pretrained else _LR * _HEAD_SCALE if frozen == "all" else _LR), 32
    lr = float(f"{base * math.sqrt(batch / reference):.2g}")
    rule = f"{base:g} at batch {reference}, times the square root of the batch ratio."
    set_("optim.lr", lr, f"{rule} Scale it in the same way if you change the batch.")
    if pretrained and frozen != "all":
        set_("optim.head_lr_scale", _HEAD_SCALE, "The head is new, the backbone is not.")
    set_("optim.weight_decay", 0.05)
    set_("optim.warmup_epochs", 0.5 if pretrained else min(5.0, epochs / 10))


def _set_train(
    recipe: Recipe, data: Survey, machine: Machine, batch: int, epochs: int, note: str, pretrained: bool
) -> None:
    set_ = recipe.set
    set_("train.epochs", epochs, note)
    steps = data.num_train // batch
    set_("train.batch_size", batch, f"Over all processes: {steps:,} step(s) per epoch.")
    if machine.gpus:
        set_("train.precision", "bf16", "fp16 on GPUs older than Ampere.")
    set_("train.log_every_steps", max(1, min(50, steps // 2)))
    if not pretrained and epochs > 20:
        set_("train.eval_every_epochs", 5)
