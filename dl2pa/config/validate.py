"""Validation of a configuration against the number of processes and the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dl2pa.config.checks import (
    check_batches,
    check_calibration_fraction,
    check_combination,
    check_input,
    check_launch,
    check_lengths,
    check_loader,
    check_memory,
    check_num_classes,
    check_optimizer,
    check_recipe,
    check_val_fraction,
)
from dl2pa.config.gather import Problems, gathered
from dl2pa.config.method_checks import check_contrast
from dl2pa.config.notify import check_notify
from dl2pa.config.remote import check_remote
from dl2pa.config.schema import Config
from dl2pa.config.tracking import check_tracking
from dl2pa.errors import UserError


@dataclass(frozen=True)
class DataSizes:
    """Sizes of an opened data set.

    Attributes:
        num_train, num_val: images of the two splits.
        image_size: side length of the images of an array data set, in pixels; None for image files.
    """

    num_train: int
    num_val: int
    num_classes: int
    image_size: int | None = None


def validate(config: Config, world_size: int, data: DataSizes | None = None) -> None:
    """Check the combination of settings, processes and data.

    Args:
        world_size: number of processes.
        data: None checks only what can be checked before the data is opened.

    Raises:
        UserError: all invalid fields.
    """
    problems = Problems()
    with problems:
        check_loader(config)
    with problems:
        check_recipe(config)
    with problems:
        check_val_fraction(config)
    with problems:
        check_remote(config)
    with problems:
        check_calibration_fraction(config)
    with problems:
        check_input(config)
    with problems:
        check_launch(config, world_size)
    with problems:
        check_batches(config, world_size)
    with problems:
        check_memory(config, world_size)
    with problems:
        check_contrast(config, world_size)
    with problems:
        check_optimizer(config)
    with problems:
        check_tracking(config.tracking)
    with problems:
        check_notify(config.notify)
    with problems:
        _check_compile(config, world_size)
    with problems:
        check_combination(config)
    with problems:
        if data is not None:
            _check_data(config, data)
        elif config.data.num_classes is not None:
            check_num_classes(config, config.data.num_classes)
    problems.raise_any()


@gathered
def _check_compile(config: Config, world_size: int) -> Iterator[UserError]:
    if config.train.compile == "graphs" and world_size > 1:
        message = "works with one process only: torch skips CUDA graphs with DDP and BatchNorm"
        yield UserError("train.compile", "graphs", message, "Set train.compile=true.")


def _check_data(config: Config, data: DataSizes) -> None:
    if data.num_val == 0:
        raise UserError("data.val_root", config.data.val_root, "holds no images", "Give a validation set.")
    problems = Problems()
    with problems:
        check_lengths(config, data.num_train)
    with problems:
        check_num_classes(config, data.num_classes)
    with problems:
        if data.image_size not in (None, config.data.image_size):
            raise UserError(
                "data.image_size",
                config.data.image_size,
                f"the images of {config.data.dataset} measure {data.image_size} x {data.image_size}",
                f"Set data.image_size={data.image_size}.",
            )
    problems.raise_any()
