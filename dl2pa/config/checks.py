"""Checks of combinations of settings; ``validate`` calls them."""

from __future__ import annotations

from dl2pa.config.schema import Config
from dl2pa.errors import UserError
from dl2pa.specs import DATASETS, METHODS, SYNTHETIC, backbone_spec

MAX_REFIT_CLASSES = 4096
"""Largest number of classes with refit prototypes: each of the 400 steps of an update costs C² d."""


def check_batches(config: Config, world_size: int) -> None:
    """Check that the batch divides into virtual shards, and these into processes.

    Raises:
        UserError: for train.virtual_shards or launch.nproc.
    """
    batch, shards = config.train.batch_size, config.virtual_shards
    if batch % shards:
        raise UserError(
            "train.virtual_shards",
            shards,
            f"does not divide train.batch_size = {batch}",
            "Choose a divisor of the batch.",
        )
    if shards % world_size:
        fitting = [n for n in range(1, shards + 1) if shards % n == 0]
        auto = "(launch.nproc=auto: one process per GPU) " if config.launch.nproc == "auto" else ""
        raise UserError(
            "launch.nproc",
            world_size,
            f"{auto}does not divide the batch's {shards} virtual shards (train.batch_size = {batch})",
            f"Use a number of processes among {fitting}, or set train.batch_size or train.virtual_shards.",
        )


def check_launch(config: Config, world_size: int) -> None:
    """Check settings that need GPUs against `launch.device`; with `auto` the processes check them."""
    if config.launch.device != "cpu" or world_size == 1:
        return
    if config.launch.backend == "nccl":
        remedy = "Use auto or gloo, or launch.device=cuda."
        raise UserError("launch.backend", "nccl", "needs GPUs", remedy)
    if config.train.sync_bn:
        raise UserError("train.sync_bn", True, "needs GPUs", "Set train.sync_bn=false or launch.device=cuda.")


def check_lengths(config: Config, num_train: int) -> None:
    """Check that an epoch has at least one global batch."""
    if num_train < config.train.batch_size:
        raise UserError(
            "train.batch_size",
            config.train.batch_size,
            f"larger than the training set of {num_train} images",
            f"Choose at most {num_train}.",
        )


def check_method(config: Config, num_classes: int) -> None:
    """Check the combination of method, backbone and dimensions.

    Raises:
        UserError: the first invalid field.
    """
    if num_classes < 2:
        raise UserError(
            "data.num_classes", num_classes, "a classifier needs at least two classes", "Add a class."
        )
    if config.method_defaults.learned:
        _check_learned(config)
    else:
        _check_prototypical(config, num_classes)
    if config.method.margin and config.loss == "cross_entropy" and not config.normalize:
        raise UserError(
            "method.margin",
            config.method.margin,
            "a margin is subtracted from a cosine, and method.normalize = false uses none",
            "Set method.normalize=true or method.margin=0.",
        )
    backbone = backbone_spec(config.model.backbone)
    if config.model.head == "batchnorm":
        width = config.model.widths[-1]
        if not backbone.small or width != config.model.embedding_dim:
            raise UserError(
                "model.head",
                "batchnorm",
                "uses the backbone features, whose dimension must equal model.embedding_dim "
                f"= {config.model.embedding_dim}",
                f"Set model.embedding_dim={width} with a CIFAR ResNet, or model.head=linear.",
            )
    if config.data.image_size < backbone.min_image_size:
        message = f"too small for {config.model.backbone}"
        remedy = f"Choose at least {backbone.min_image_size}."
        raise UserError("data.image_size", config.data.image_size, message, remedy)


def _check_learned(config: Config) -> None:
    name, dim = config.method.name, config.model.embedding_dim
    if config.loss != "cross_entropy":
        message = f"the learned classifier {name} trains with cross_entropy"
        raise UserError("method.loss", config.loss, message, "Remove method.loss.")
    if config.assignment == "dynamic":
        raise UserError(
            "method.assignment",
            "dynamic",
            f"{name} learns its class vectors and has no fixed prototypes to assign",
            f"Use static, or a method with prototypes: {', '.join(k for k, v in METHODS.items() if not v.learned)}.",
        )
    count = config.method.sub_prototypes or config.method_defaults.sub_prototypes
    if config.method_defaults.orthonormal and count > dim:
        raise UserError(
            "method.sub_prototypes",
            count,
            f"more than the number of orthonormal vectors in {dim} dimensions (model.embedding_dim)",
            f"Choose at most {dim}.",
        )


def _check_prototypical(config: Config, num_classes: int) -> None:
    method, dim = config.method, config.model.embedding_dim
    if config.method_defaults.construction == "class_vectors" and method.class_vectors is None:
        raise UserError(
            "method.class_vectors",
            None,
            f"{method.name} computes its prototypes from vectors of the class names",
            "Give a .npy file of shape [classes, k], with one row per class in label order.",
        )
    if (
        config.method_defaults.construction == "kasarla"
        and method.prototypes == "auto"
        and dim < num_classes - 1
    ):
        raise UserError(
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
        raise UserError(
            "method.match.refit_cosine",
            method.match.refit_cosine,
            f"takes minutes per assignment update with {num_classes} classes",
            f"Remove it with more than {MAX_REFIT_CLASSES} classes.",
        )


def check_loader(config: Config) -> None:
    """Check that the loader supports the data set and its cropping."""
    layout = DATASETS[config.data.dataset].layout
    loader = config.loader
    if layout == "arrays" and loader in ("dali", "torchvision"):
        raise UserError(
            "data.loader",
            loader,
            f"{config.data.dataset} consists of arrays, not image files",
            "Use resident.",
        )
    if layout != "generated" and loader == DATASETS[SYNTHETIC].loader:
        raise UserError(
            "data.loader",
            loader,
            f"does not read data.dataset = {config.data.dataset}",
            f"Set data.dataset={SYNTHETIC}.",
        )
    if loader == "resident" and config.data.crop == "random_resized":
        raise UserError(
            "data.crop",
            "random_resized",
            "resident arrays support the crops pad and none",
            "Set data.crop=pad.",
        )
    if loader in ("dali", "torchvision") and config.data.crop == "pad":
        raise UserError(
            "data.crop",
            "pad",
            "image files support the crops random_resized and none",
            "Set data.loader=resident.",
        )
    if loader in ("dali", "torchvision") and config.data.eval_resize < config.data.image_size:
        raise UserError(
            "data.eval_resize",
            config.data.eval_resize,
            f"smaller than the crop, data.image_size = {config.data.image_size}",
            f"Choose at least {config.data.image_size}.",
        )
    if layout == "generated" and config.data.num_classes is None:
        raise UserError(
            "data.num_classes", None, "synthetic data needs a number of classes", "Set data.num_classes."
        )
    if layout == "generated" and config.data.imbalance is not None:
        raise UserError(
            "data.imbalance",
            config.data.imbalance,
            "not supported for synthetic data",
            "Remove it, or choose another data.dataset.",
        )
    low, high = config.data.crop_scale
    if not 0 < low <= high:
        raise UserError("data.crop_scale", [low, high], "not a range in (0, 1]", "Write [low, high].")
    low, high = config.data.crop_ratio
    if low > high:
        raise UserError("data.crop_ratio", [low, high], "not a range", "Write [low, high].")


def warnings(config: Config, num_classes: int) -> list[str]:
    """Warnings about settings that are valid but probably not intended."""
    result: list[str] = []
    if config.assignment == "dynamic" and config.model.embedding_dim >= num_classes - 1:
        result.append(
            f"model.embedding_dim = {config.model.embedding_dim} >= C - 1 = {num_classes - 1}: the prototypes are a "
            "regular simplex, every permutation of which is an isometry, so a dynamic assignment has no effect; "
            "method.assignment=static costs less."
        )
    if config.model.freeze_epochs and config.model.init is None:
        result.append("model.freeze_epochs freezes a backbone with random weights; set model.init.")
    side, data = config.data.image_size / config.data.eval_resize, config.data
    if config.loader in ("dali", "torchvision") and side < 0.5:
        result.append(
            f"data.eval_resize = {data.eval_resize} with data.image_size = {data.image_size}: validation uses the "
            f"middle {100 * side**2:.0f} % of a square image; data.eval_resize="
            f"{round(data.image_size / 0.875)} uses seven eighths of each side."
        )
    result.extend(f"{key} is ignored: {why}." for key, why in _ignored(config) if _was_set(config, key))
    return result


def _ignored(config: Config) -> list[tuple[str, str]]:
    """Keys that other settings make ineffective, each with the reason."""
    data, method, optim = config.data, config.method, config.optim
    name, schedule = method.name, f"optim.schedule is {optim.schedule}"
    learned, softmax = config.method_defaults.learned, config.loss == "cross_entropy"
    factors = ("method.scale", "method.learn_scale", "method.margin")
    spec, backbone = config.method_defaults, config.model.backbone
    generated = DATASETS[data.dataset].layout == "generated"
    table: list[tuple[bool, tuple[str, ...], str]] = [
        (config.assignment == "static", ("method.match",), "method.assignment is static"),
        (
            learned,
            ("method.prototypes", "method.prototype_seed", "method.class_vectors"),
            f"{name} learns its class vectors",
        ),
        (
            spec.construction == "class_vectors",
            ("method.prototypes", "method.prototype_seed"),
            f"the prototypes of {name} are its class vectors",
        ),
        (
            not softmax,
            (*factors, "method.logit_adjustment", "method.label_smoothing", "method.normalize"),
            f"the loss is {config.loss}",
        ),
        (
            learned and not spec.fixed_form and not config.normalize,
            factors,
            "the linear classifier has no scale",
        ),
        (not spec.scaled, factors, f"{name} normalizes its scores over the classes"),
        (generated, ("method.logit_adjustment",), "synthetic classes are balanced"),
        (spec.fixed_form, ("method.normalize",), f"{name} defines the normalization"),
        (spec.sub_prototypes == 1, ("method.sub_prototypes",), f"{name} has one vector per class"),
        (not spec.centroid_momentum, ("method.centroid_momentum",), f"{name} has no centroids"),
        (not backbone_spec(backbone).small, ("model.shortcut", "model.widths"), f"{backbone} defines them"),
        (data.crop != "random_resized", ("data.crop_scale", "data.crop_ratio"), f"data.crop is {data.crop}"),
        (data.crop != "pad", ("data.pad",), f"data.crop is {data.crop}"),
        (config.loader == "resident", ("data.eval_resize",), "resident arrays are not resized"),
        (config.model.freeze_epochs == "all", ("optim.layer_decay",), "the backbone is frozen"),
        (optim.schedule != "step", ("optim.milestones", "optim.gamma"), schedule),
        (optim.schedule != "cosine", ("optim.min_lr",), schedule),
        (optim.name == "adamw", ("optim.momentum", "optim.nesterov"), "adamw uses optim.betas"),
        (optim.name == "sgd", ("optim.betas",), "sgd uses optim.momentum"),
        (
            not config.tracking.enabled,
            ("tracking.uri", "tracking.experiment", "tracking.run_name"),
            "tracking.enabled is false",
        ),
    ]
    return [(key, why) for applies, keys, why in table if applies for key in keys]


def _was_set(config: Config, key: str) -> bool:
    """Whether the key was set to a value other than its default (a resolved file contains every default)."""
    section, _, name = key.partition(".")
    part = getattr(config, section)
    return name in part.model_fields_set and getattr(part, name) != type(part).model_fields[name].default
