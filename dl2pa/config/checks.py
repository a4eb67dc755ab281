"""Checks of combinations of settings; ``validate`` calls them. Each one raises all problems that it finds."""

from __future__ import annotations

from collections.abc import Iterator

from dl2pa.config.gather import Problems, gathered
from dl2pa.config.method_checks import METHOD_CHECKS
from dl2pa.config.schema import TIMM_OPTIMIZERS, Config
from dl2pa.errors import UserError
from dl2pa.specs import (
    DATASETS,
    FEATURES,
    IDENTITY,
    IMAGE_FOLDER,
    METHODS,
    MLP,
    SYNTHETIC,
    backbone_spec,
    check_timm,
    dataset_spec,
)

MAX_REFIT_CLASSES = 4096
"""Largest number of classes with refit prototypes: each of the 400 steps of an update costs C² d."""


@gathered
def check_batches(config: Config, world_size: int) -> Iterator[UserError]:
    """Check that the batch divides into virtual shards, and these into processes.

    Raises:
        UserError: for train.virtual_shards or launch.nproc.
    """
    batch, shards = config.train.batch_size, config.virtual_shards
    if batch % shards:
        yield UserError(
            "train.virtual_shards",
            shards,
            f"does not divide train.batch_size = {batch}",
            "Choose a divisor of the batch.",
        )
        return
    if shards % world_size:
        fitting = [n for n in range(1, shards + 1) if shards % n == 0]
        auto = "(launch.nproc=auto: one process per GPU) " if config.launch.nproc == "auto" else ""
        yield UserError(
            "launch.nproc",
            world_size,
            f"{auto}does not divide the batch's {shards} virtual shards (train.batch_size = {batch})",
            f"Use a number of processes among {fitting}, or set train.batch_size or train.virtual_shards.",
        )
        return
    count = config.train.accumulate
    per_process = shards // world_size
    if count != "auto" and per_process % count:
        fitting = [n for n in range(1, per_process + 1) if per_process % n == 0]
        yield UserError(
            "train.accumulate",
            count,
            f"does not divide the {per_process} virtual shards of each process (train.batch_size = {batch})",
            f"Use a number among {fitting}, or set train.batch_size or train.virtual_shards.",
        )


@gathered
def check_memory(config: Config, world_size: int) -> Iterator[UserError]:
    """Check what micro-batches and activation checkpointing cannot be combined with.

    Raises:
        UserError: for train.accumulate or train.checkpoint_activations.
    """
    train = config.train
    if train.accumulate != 1 and train.compile == "graphs":
        message = "not possible with train.compile=graphs, which overwrites the gradients of the pass before"
        yield UserError("train.accumulate", train.accumulate, message, "Set train.compile=true.")
    if train.accumulate == "auto" and train.sync_bn and world_size > 1:
        message = (
            "cannot be tried with train.sync_bn, in which processes wait for one that runs out of memory"
        )
        yield UserError("train.accumulate", "auto", message, "Set a number, or train.sync_bn=false.")
    if train.checkpoint_activations and train.compile:
        message = "not possible with train.compile, which chooses itself what to compute again"
        remedy = "Set train.checkpoint_activations=false or train.compile=false."
        yield UserError("train.checkpoint_activations", True, message, remedy)
    if train.checkpoint_activations and train.sync_bn and world_size > 1:
        message = "not possible with train.sync_bn, whose statistics would be exchanged a second time"
        remedy = "Set train.checkpoint_activations=false or train.sync_bn=false."
        yield UserError("train.checkpoint_activations", True, message, remedy)


@gathered
def check_launch(config: Config, world_size: int) -> Iterator[UserError]:
    """Check settings that need GPUs against `launch.device`; with `auto` the processes check them."""
    if config.launch.device != "cpu" or world_size == 1:
        return
    if config.launch.backend == "nccl":
        remedy = "Use auto or gloo, or launch.device=cuda."
        yield UserError("launch.backend", "nccl", "needs GPUs", remedy)
    if config.train.sync_bn:
        yield UserError("train.sync_bn", True, "needs GPUs", "Set train.sync_bn=false or launch.device=cuda.")


def check_optimizer(config: Config) -> None:
    """Check that the library of the optimizer is installed."""
    if config.optim.name in TIMM_OPTIMIZERS:
        check_timm("optim.name", config.optim.name, "set optim.name=sgd")


@gathered
def check_val_fraction(config: Config) -> Iterator[UserError]:
    """Check that a validation split can be drawn: from class folders without one, or from arrays and features."""
    data = config.data
    if data.val_fraction is None:
        return
    spec = dataset_spec(data.dataset)
    is_drawn = spec.layout in ("arrays", "features") and spec.long_tail is None
    if data.dataset != IMAGE_FOLDER and not is_drawn:
        message = f"is not used by data.dataset={data.dataset}, which includes its validation split"
        yield UserError("data.val_fraction", data.val_fraction, message, "Leave it out.")
    if data.val_root is not None:
        remedy = "Remove one of the two; on the command line, set data.val_fraction=null."
        message = f"conflicts with data.val_root = {data.val_root}"
        yield UserError("data.val_fraction", data.val_fraction, message, remedy)


def check_calibration_fraction(config: Config) -> None:
    """Check that the data set has images that can be held out."""
    data = config.data
    if data.calibration_fraction and dataset_spec(data.dataset).layout == "generated":
        message = f"is not used by data.dataset={data.dataset}, which has no images to hold out"
        raise UserError("data.calibration_fraction", data.calibration_fraction, message, "Leave it out.")


@gathered
def check_lengths(config: Config, num_train: int) -> Iterator[UserError]:
    """Check that an epoch has at least one global batch."""
    if num_train < config.train.batch_size:
        yield UserError(
            "train.batch_size",
            config.train.batch_size,
            f"larger than the training set of {num_train} images",
            f"Choose at most {num_train}.",
        )


def check_method(config: Config, num_classes: int) -> None:
    """Check the combination of method, backbone and dimensions.

    Raises:
        UserError: the invalid fields.
    """
    problems = Problems()
    with problems:
        check_num_classes(config, num_classes)
    with problems:
        check_combination(config)
    problems.raise_any()


def check_combination(config: Config) -> None:
    """Check the part of the combination of method and backbone that does not depend on the number of classes.

    Raises:
        UserError: the invalid fields.
    """
    problems = Problems()
    checks = (
        *(_check_learned, _check_class_vectors, _check_head, check_image_size),
        *METHOD_CHECKS,
    )
    for check in checks:
        with problems:
            check(config)
    problems.raise_any()


@gathered
def _check_head(config: Config) -> Iterator[UserError]:
    backbone = backbone_spec(config.model.backbone)
    if config.model.head == "batchnorm" and not backbone.takes_features:
        width = config.model.widths[-1]
        if not backbone.small or width != config.model.embedding_dim:
            yield UserError(
                "model.head",
                "batchnorm",
                "uses the backbone features, whose dimension must equal model.embedding_dim "
                f"= {config.model.embedding_dim}",
                f"Set model.embedding_dim={width} with a CIFAR ResNet, or model.head=linear.",
            )


@gathered
def check_image_size(config: Config) -> Iterator[UserError]:
    """Check that the images are large enough for the backbone."""
    backbone = backbone_spec(config.model.backbone)
    if config.data.image_size < backbone.min_image_size:
        message = f"too small for {config.model.backbone}"
        remedy = f"Choose at least {backbone.min_image_size}."
        yield UserError("data.image_size", config.data.image_size, message, remedy)


@gathered
def _check_learned(config: Config) -> Iterator[UserError]:
    if not config.method_defaults.learned:
        return
    name = config.method.name
    is_single = config.method_defaults.sub_prototypes == 1
    if config.loss == "ntce" and is_single and not config.normalize:
        message = "compares cosines, and method.normalize = false uses none"
        yield UserError("method.loss", "ntce", message, "Set method.normalize=true.")
    if config.loss not in ("cross_entropy", "ntce") or (config.loss == "ntce" and not is_single):
        message = f"the learned classifier {name} trains with cross_entropy"
        yield UserError("method.loss", config.loss, message, "Remove method.loss.")
    if config.assignment == "dynamic":
        yield UserError(
            "method.assignment",
            "dynamic",
            f"{name} learns its class vectors and has no fixed prototypes to assign",
            f"Use static, or a method with prototypes: {', '.join(k for k, v in METHODS.items() if not v.learned)}.",
        )
    count, dim = (
        config.method.sub_prototypes or config.method_defaults.sub_prototypes,
        config.model.embedding_dim,
    )
    if config.method_defaults.orthonormal and count > dim:
        yield UserError(
            "method.sub_prototypes",
            count,
            f"more than the number of orthonormal vectors in {dim} dimensions (model.embedding_dim)",
            f"Choose at most {dim}.",
        )


@gathered
def _check_class_vectors(config: Config) -> Iterator[UserError]:
    method = config.method
    if config.method_defaults.construction == "class_vectors" and method.class_vectors is None:
        yield UserError(
            "method.class_vectors",
            None,
            f"{method.name} computes its prototypes from vectors of the class names",
            "Give a .npy file of shape [classes, k], with one row per class in label order.",
        )


@gathered
def check_num_classes(config: Config, num_classes: int) -> Iterator[UserError]:
    """Check settings that depend on the number of classes."""
    if num_classes < 2:
        yield UserError(
            "data.num_classes", num_classes, "a classifier needs at least two classes", "Add a class."
        )
        return
    method, dim = config.method, config.model.embedding_dim
    for key, largest in (("neighbors", num_classes - 1), ("random", num_classes)):
        value = getattr(method.negatives, key)
        if value > largest and config.loss == "cross_entropy":
            message = f"more than the {largest} classes to choose from"
            yield UserError(f"method.negatives.{key}", value, message, f"Set at most {largest}.")
    if (
        config.method_defaults.construction == "kasarla"
        and method.prototypes == "auto"
        and dim < num_classes - 1
    ):
        yield UserError(
            "model.embedding_dim",
            dim,
            f"{method.name}'s simplex of {num_classes} classes needs at least {num_classes - 1} dimensions",
            f"Set model.embedding_dim={num_classes - 1}, or method.prototypes=max_cosine.",
        )
    if (
        method.match.refit_cosine is not None
        and config.assignment == "dynamic"
        and num_classes > MAX_REFIT_CLASSES
    ):
        yield UserError(
            "method.match.refit_cosine",
            method.match.refit_cosine,
            f"takes minutes per assignment update with {num_classes} classes",
            f"Remove it with more than {MAX_REFIT_CLASSES} classes.",
        )


def check_loader(config: Config) -> None:
    """Check that the loader supports the data set and its cropping."""
    problems = Problems()
    for check in (_check_layout, _check_eval_resize, check_generated, _check_crop_scale, _check_crop_ratio):
        with problems:
            check(config)
    problems.raise_any()


@gathered
def _check_layout(config: Config) -> Iterator[UserError]:
    layout = dataset_spec(config.data.dataset).layout
    loader = config.loader
    if layout == "arrays" and loader in ("dali", "torchvision"):
        yield UserError(
            "data.loader",
            loader,
            f"{config.data.dataset} consists of arrays, not image files",
            "Use resident.",
        )
    if layout == "features":
        _check_features(config)
        return
    if layout != "generated" and loader == DATASETS[SYNTHETIC].loader:
        yield UserError(
            "data.loader",
            loader,
            f"does not read data.dataset = {config.data.dataset}",
            f"Set data.dataset={SYNTHETIC}.",
        )
        return
    if loader == "resident" and config.data.crop == "random_resized":
        yield UserError(
            "data.crop",
            "random_resized",
            "resident arrays support the crops pad and none",
            "Set data.crop=pad.",
        )
    if loader in ("dali", "torchvision") and config.data.crop == "pad":
        yield UserError(
            "data.crop",
            "pad",
            "image files support the crops random_resized and none",
            "Set data.loader=resident.",
        )


@gathered
def _check_eval_resize(config: Config) -> Iterator[UserError]:
    if config.loader in ("dali", "torchvision") and config.data.eval_resize < config.data.image_size:
        yield UserError(
            "data.eval_resize",
            config.data.eval_resize,
            f"smaller than the crop, data.image_size = {config.data.image_size}",
            f"Choose at least {config.data.image_size}.",
        )


@gathered
def check_generated(config: Config) -> Iterator[UserError]:
    """Check the settings of synthetic data."""
    if dataset_spec(config.data.dataset).layout != "generated":
        return
    if config.data.num_classes is None:
        yield UserError(
            "data.num_classes", None, "synthetic data needs a number of classes", "Set data.num_classes."
        )
    if config.data.label_noise:
        message, remedy = "not supported for synthetic data", "Remove it, or choose another data.dataset."
        yield UserError("data.label_noise", config.data.label_noise, message, remedy)
    if config.data.imbalance is not None:
        yield UserError(
            "data.imbalance",
            config.data.imbalance,
            "not supported for synthetic data",
            "Remove it, or choose another data.dataset.",
        )


@gathered
def _check_crop_scale(config: Config) -> Iterator[UserError]:
    low, high = config.data.crop_scale
    if not 0 < low <= high:
        yield UserError("data.crop_scale", [low, high], "not a range in (0, 1]", "Write [low, high].")


@gathered
def _check_crop_ratio(config: Config) -> Iterator[UserError]:
    low, high = config.data.crop_ratio
    if low > high:
        yield UserError("data.crop_ratio", [low, high], "not a range", "Write [low, high].")


def _check_features(config: Config) -> None:
    if config.loader != "resident":
        message = "features are not images"
        raise UserError("data.loader", config.loader, message, "Use resident.")
    if config.train.cutmix:
        message = "cuts boxes out of images, which features are not"
        raise UserError(
            "train.cutmix", config.train.cutmix, message, "Set train.cutmix=0; train.mixup works."
        )


def check_input(config: Config) -> None:
    """Check that the backbone takes what the data set contains: images or feature vectors."""
    name = config.model.backbone
    is_features = dataset_spec(config.data.dataset).layout == "features"
    if is_features and not backbone_spec(name).takes_features:
        remedy = f"Set model.backbone={IDENTITY} or {MLP}."
        raise UserError("model.backbone", name, f"takes images, and data.dataset = {FEATURES}", remedy)
    if not is_features and backbone_spec(name).takes_features:
        message = f"takes features, and data.dataset = {config.data.dataset}"
        remedy = f"Set data.dataset={FEATURES} (see `dl2pa features`), or choose another backbone."
        raise UserError("model.backbone", name, message, remedy)


@gathered
def check_recipe(config: Config) -> Iterator[UserError]:
    """Check that the recipe's settings do not contradict each other.

    Raises:
        UserError: for data.rand_augment or train.patience.
    """
    data, train = config.data, config.train
    if data.trivial_augment and data.rand_augment:
        yield UserError(
            "data.rand_augment",
            data.rand_augment,
            "data.trivial_augment is on, too; both choose the operations of an image",
            "Set data.trivial_augment=false or data.rand_augment=0.",
        )
    if train.patience is not None and train.patience < train.eval_every_epochs:
        yield UserError(
            "train.patience",
            train.patience,
            f"shorter than the {train.eval_every_epochs} epochs between two validations (train.eval_every_epochs)",
            f"Set train.patience={train.eval_every_epochs} or more, or validate more often.",
        )
