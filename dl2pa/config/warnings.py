"""Warnings about settings that are valid but probably not intended."""

from __future__ import annotations

from functools import reduce

from dl2pa.config.schema import MOMENTUM_OPTIMIZERS, Config, MatchConfig
from dl2pa.specs import FEATURES, IDENTITY, MLP, backbone_spec, dataset_spec


def warnings(config: Config, num_classes: int) -> list[str]:
    """Sentences about settings that have no effect, or an effect that is probably not intended."""
    result: list[str] = []
    if config.assignment == "dynamic" and config.model.embedding_dim >= num_classes - 1:
        result.append(
            f"model.embedding_dim = {config.model.embedding_dim} >= C - 1 = {num_classes - 1}: the prototypes are a "
            "regular simplex, every permutation of which is an isometry, so a dynamic assignment has no effect; "
            "method.assignment=static costs less."
        )
    if config.train.patience is not None and not config.checkpoint.keep_best:
        result.append(
            "train.patience ends the run after its best epoch, whose weights are not kept; set "
            "checkpoint.keep_best=true."
        )
    epochs, frozen = config.train.epochs, config.model.freeze_epochs
    if config.train.patience is not None and config.train.patience >= epochs:
        result.append(
            f"train.patience = {config.train.patience} has no effect: the run has train.epochs = {epochs}."
        )
    if frozen != "all" and frozen >= epochs:
        result.append(
            f"model.freeze_epochs = {frozen} freezes the backbone in all {epochs} epochs; if this is intended, set "
            "model.freeze_epochs=all, which needs less memory."
        )
    result.extend((*_about_warmup(config), *_about_updates(config), *_about_rate(config)))
    is_random = config.model.init is None and config.model.backbone != IDENTITY
    if config.model.freeze_epochs and is_random:
        result.append("model.freeze_epochs freezes a backbone with random weights; set model.init.")
    if config.model.freeze_before is not None and is_random:
        result.append("model.freeze_before freezes layers with random weights; set model.init.")
    if config.model.freeze_norm and is_random:
        result.append("model.freeze_norm fixes the statistics of random weights; set model.init.")
    side, data = config.data.image_size / config.data.eval_resize, config.data
    if config.loader in ("dali", "torchvision") and side < 0.5:
        result.append(
            f"data.eval_resize = {data.eval_resize} with data.image_size = {data.image_size}: validation uses the "
            f"middle {100 * side**2:.0f} % of a square image; data.eval_resize="
            f"{round(data.image_size / 0.875)} uses seven eighths of each side."
        )
    result.extend(f"{key} is ignored: {why}." for key, why in _ignored(config) if _was_set(config, key))
    return result


def _about_warmup(config: Config) -> list[str]:
    """Sentences about a warm-up with a learned classifier that no assignment update can end."""
    match, epochs = config.method.match, config.train.epochs
    if config.assignment != "dynamic" or not match.warmup_epochs:
        return []
    result: list[str] = []
    if match.last_epoch is not None and match.last_epoch < match.warmup_epochs:
        result.append(
            f"method.match.last_epoch = {match.last_epoch} is before the end of the warm-up "
            f"(method.match.warmup_epochs = {match.warmup_epochs}), so no assignment update is made."
        )
    if match.warmup_epochs > epochs:
        result.append(
            f"method.match.warmup_epochs = {match.warmup_epochs} is longer than the {epochs} epochs: the run trains "
            "and exports the learned classifier of the warm-up and uses no prototypes."
        )
    return result


def _about_updates(config: Config) -> list[str]:
    """Sentences about assignment updates and a release of the class vectors that the run does not reach."""
    match, epochs, release = config.method.match, config.train.epochs, config.method.release_epoch
    result: list[str] = []
    if release is not None and release >= epochs and not config.method_defaults.learned:
        result.append(f"method.release_epoch = {release} has no effect: the run has train.epochs = {epochs}.")
    by_epoch = 0 < match.every_epochs <= min(epochs, match.last_epoch or epochs)
    by_step = match.every_steps or (match.early_steps and match.early_epochs)
    if config.assignment == "dynamic" and not (by_epoch or by_step or match.warmup_epochs):
        result.append(
            f"method.assignment is dynamic, but no assignment update is made in the {epochs} epochs of the run "
            f"(method.match.every_epochs = {match.every_epochs}); method.assignment=static costs less."
        )
    return result


def _about_rate(config: Config) -> list[str]:
    """Sentences about a schedule of the learning rate that the run does not reach, or that rises."""
    optim, epochs, peak = config.optim, config.train.epochs, config.scaled_optim.lr
    late = [milestone for milestone in optim.milestones if milestone >= epochs]
    result: list[str] = []
    if optim.warmup_epochs >= epochs:
        result.append(
            f"optim.warmup_epochs = {optim.warmup_epochs:g} is not shorter than the {epochs} epochs of the run: the "
            "learning rate does not reach its peak."
        )
    if optim.schedule == "cosine" and optim.min_lr > peak:
        result.append(
            f"optim.min_lr = {optim.min_lr:g} is greater than the peak rate {peak:g}, so that the learning rate rises "
            "after the warm-up."
        )
    if optim.schedule == "step" and late:
        result.append(
            f"optim.milestones: {', '.join(map(str, late))} has no effect: the run has train.epochs = {epochs}."
        )
    if optim.schedule == "step" and not optim.milestones:
        result.append("optim.schedule = step without optim.milestones keeps the learning rate constant.")
    return result


def _match_keys(config: Config) -> tuple[str, ...]:
    """Keys of assignment updates; class vectors use the solver without updates, too."""
    if config.method.class_vectors is None:
        return ("method.match",)
    return tuple(f"method.match.{key}" for key in MatchConfig.model_fields if key != "solver")


def _ignored(config: Config) -> list[tuple[str, str]]:
    """Keys that other settings make ineffective, each with the reason."""
    data, method, optim = config.data, config.method, config.optim
    match, dynamic = method.match, config.assignment == "dynamic"
    name, schedule = method.name, f"optim.schedule is {optim.schedule}"
    learned, softmax = config.method_defaults.learned, config.loss == "cross_entropy"
    scales = ("method.scale", "method.learn_scale")
    factors = (*scales, "method.margin")
    selection = ("method.gce_q", "method.negatives")
    spec, backbone = config.method_defaults, config.model.backbone
    generated = dataset_spec(data.dataset).layout == "generated"
    momentum = optim.name in MOMENTUM_OPTIMIZERS
    table: list[tuple[bool, tuple[str, ...], str]] = [
        (config.assignment == "static", _match_keys(config), "method.assignment is static"),
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
            ("method.logit_adjustment", "method.label_smoothing", "method.margin", *selection),
            f"the loss is {config.loss}",
        ),
        (not softmax and config.loss != "ntce", scales, f"the loss is {config.loss}"),
        (not softmax and not learned, ("method.normalize",), f"the loss is {config.loss}"),
        (dynamic and not match.early_epochs, ("method.match.early_steps",), "method.match.early_epochs is 0"),
        (dynamic and not match.early_steps, ("method.match.early_epochs",), "method.match.early_steps is 0"),
        (
            dynamic and not match.warmup_epochs,
            ("method.match.warmup_scale",),
            "method.match.warmup_epochs is 0",
        ),
        (learned, ("method.release_epoch",), f"{name} learns its class vectors from the start"),
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
        (
            backbone != MLP,
            ("model.hidden", "model.hidden_norm", "model.dropout"),
            f"model.backbone is {backbone}",
        ),
        (
            data.dataset == FEATURES,
            (
                "data.trivial_augment",
                "data.rand_augment",
                "data.color_jitter",
                "data.erasing",
                "train.channels_last",
            ),
            f"data.dataset is {FEATURES}",
        ),
        (not backbone_spec(backbone).small, ("model.shortcut", "model.widths"), f"{backbone} defines them"),
        (data.crop != "random_resized", ("data.crop_scale", "data.crop_ratio"), f"data.crop is {data.crop}"),
        (not generated, ("data.synthetic_samples",), f"data.dataset is {data.dataset}"),
        (not data.label_noise, ("data.label_noise_seed",), "data.label_noise is 0"),
        (data.crop != "pad", ("data.pad",), f"data.crop is {data.crop}"),
        (not data.rand_augment, ("data.rand_magnitude",), "data.rand_augment is 0"),
        (config.loader == "resident", ("data.eval_resize",), "resident arrays are not resized"),
        (
            config.model.freeze_epochs == "all" and backbone != IDENTITY,
            ("optim.layer_decay", "train.checkpoint_activations", "model.freeze_before", "model.freeze_norm"),
            "the backbone is frozen",
        ),
        (
            config.model.freeze_norm and config.model.head == "linear",
            ("train.sync_bn",),
            "model.freeze_norm fixes the statistics",
        ),
        (
            backbone == IDENTITY,
            ("model.freeze_epochs", "model.freeze_norm", "optim.layer_decay"),
            f"{backbone} has no weights",
        ),
        (not optim.warmup_epochs, ("optim.warmup_start",), "optim.warmup_epochs is 0"),
        (momentum and not optim.momentum, ("optim.nesterov",), "optim.momentum is 0"),
        (optim.schedule != "step", ("optim.milestones", "optim.gamma"), schedule),
        (optim.schedule != "cosine", ("optim.min_lr",), schedule),
        (not momentum, ("optim.momentum", "optim.nesterov"), f"{optim.name} uses optim.betas"),
        (momentum, ("optim.betas",), f"{optim.name} uses optim.momentum"),
        (
            not config.tracking.enabled,
            ("tracking.uri", "tracking.experiment", "tracking.run_name"),
            "tracking.enabled is false",
        ),
    ]
    return [(key, why) for applies, keys, why in table if applies for key in keys]


def _was_set(config: Config, key: str) -> bool:
    """Whether the key was set to a value other than its default (a resolved file contains every default)."""
    *sections, name = key.split(".")
    part = reduce(getattr, sections, config)
    return name in part.model_fields_set and getattr(part, name) != type(part).model_fields[name].default
