"""Checks of the settings of loss, class vectors and assignment updates; ``check_combination`` calls them."""

from __future__ import annotations

from collections.abc import Iterator

from dl2pa.config.gather import gathered
from dl2pa.config.schema import Config
from dl2pa.errors import UserError
from dl2pa.specs import FEATURES, dataset_spec


@gathered
def check_contrast(config: Config, world_size: int) -> Iterator[UserError]:
    """Check that one pass has the entire batch if the loss compares its images with each other.

    Raises:
        UserError: for launch.nproc or train.accumulate.
    """
    if config.loss != "ntce":
        return
    message = "method.loss=ntce compares all images of a batch with each other"
    if world_size > 1:
        yield UserError("launch.nproc", world_size, message, "Set launch.nproc=1.")
    if config.train.accumulate != 1:
        yield UserError("train.accumulate", config.train.accumulate, message, "Set train.accumulate=1.")


@gathered
def _check_margin(config: Config) -> Iterator[UserError]:
    if config.method.margin and config.loss == "cross_entropy" and not config.normalize:
        yield UserError(
            "method.margin",
            config.method.margin,
            "a margin is subtracted from a cosine, and method.normalize = false uses none",
            "Set method.normalize=true or method.margin=0.",
        )


@gathered
def _check_rotate(config: Config) -> Iterator[UserError]:
    match = config.method.match
    follows = match.refit_cosine is not None and match.statistic == "embedding"
    if match.rotate and follows and config.assignment == "dynamic":
        message = (
            "cannot be combined with method.match.refit_cosine, which moves the prototypes to the class means"
        )
        yield UserError("method.match.rotate", True, message, "Remove one of the two.")


@gathered
def _check_statistic(config: Config) -> Iterator[UserError]:
    is_features = dataset_spec(config.data.dataset).layout == "features"
    if config.method.match.statistic == "input" and config.assignment == "dynamic" and not is_features:
        message = f"uses the vectors of data.dataset={FEATURES}, and data.dataset = {config.data.dataset}"
        yield UserError("method.match.statistic", "input", message, "Set method.match.statistic=pooled.")


@gathered
def _check_gce(config: Config) -> Iterator[UserError]:
    smoothing = config.label_smoothing
    if config.method.gce_q and config.loss == "cross_entropy" and smoothing:
        message = f"is defined without label smoothing, and method.label_smoothing = {smoothing}"
        yield UserError("method.gce_q", config.method.gce_q, message, "Set method.label_smoothing=0.")


@gathered
def _check_negatives(config: Config) -> Iterator[UserError]:
    method, defaults = config.method, config.method_defaults
    used = {key: value for key, value in method.negatives.model_dump().items() if value}
    if not used or config.loss != "cross_entropy":
        return
    key, value = next(iter(used.items()))
    field = f"method.negatives.{key}"
    if defaults.sub_prototypes > 1:
        message = f"{method.name} compares with several vectors per class"
        yield UserError(field, value, message, "Remove method.negatives.")
    elif defaults.learned and method.negatives.neighbors:
        message = f"{method.name} learns its class vectors, so that the nearest ones change"
        yield UserError("method.negatives.neighbors", value, message, "Set method.negatives.random only.")
    if config.label_smoothing:
        message = f"needs no label smoothing over all classes, and method.label_smoothing = {config.label_smoothing}"
        yield UserError(field, value, message, "Set method.label_smoothing=0.")


@gathered
def _check_release(config: Config) -> Iterator[UserError]:
    release, match = config.method.release_epoch, config.method.match
    if release is None or config.assignment != "dynamic" or config.method_defaults.learned:
        return
    if release == 0:
        message = "trains the class vectors from the start, so that no assignment update can follow"
        remedy = "Set method.assignment=static, or a later epoch."
        yield UserError("method.release_epoch", release, message, remedy)
    elif max(match.last_epoch or release + 1, match.warmup_epochs) > release:
        message = f"assignment updates continue after epoch {release}, when the class vectors are trained"
        remedy = f"Set method.match.last_epoch={release}, and method.match.warmup_epochs to at most that."
        yield UserError("method.release_epoch", release, message, remedy)


METHOD_CHECKS = (
    *(_check_margin, _check_rotate, _check_statistic),
    *(_check_gce, _check_negatives, _check_release),
)
"""Checks that need the configuration only."""
