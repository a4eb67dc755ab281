"""Data set, transforms and pipelines of a configuration. Opening a data set imports no torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from dl2pa.config import Config
from dl2pa.config.checks import check_calibration_fraction, check_generated, check_val_fraction
from dl2pa.config.gather import Problems
from dl2pa.config.prototypes import check_source_exists
from dl2pa.config.remote import check_remote
from dl2pa.config.schema import DataConfig
from dl2pa.config.validate import DataSizes, validate
from dl2pa.container import in_container
from dl2pa.errors import UserError
from dl2pa.specs import dataset_spec, is_own, is_remote
from pipelines.dataset import Dataset, SyntheticDataset, num_samples
from pipelines.datasets import ArrayDataset, ImageTable, check_num_classes, has_digits, open_dataset
from pipelines.datasets.classes import empty_classes
from pipelines.datasets.holdout import hold_out
from pipelines.datasets.label_noise import with_label_noise
from pipelines.longtail import Group, class_groups
from pipelines.remote.address import RemoteOptions, place_of
from pipelines.sampler import EvalSampler, Sampler, SubsetSampler, TrainSampler

if TYPE_CHECKING:
    import torch

    from dl2pa.training.distributed import World
    from pipelines.batch import Pipeline
    from pipelines.transforms import Transforms

log = logging.getLogger(__name__)

T = TypeVar("T")

DIGITS_ROOTS = (Path("data/digits"), Path("runs/digits"))
"""Folders for the digits without `data.root`; the second is for places where data/ is not writable, as in the image."""


@dataclass(frozen=True)
class DataSplits:
    """Training and validation split, with the same classes in the same order.

    Attributes:
        groups: head, medium or tail per class; None if the training split is not long-tailed.
        calibration: training images that `data.calibration_fraction` holds out; None without it.
    """

    train: Dataset
    val: Dataset
    classes: tuple[str, ...]
    groups: tuple[Group, ...] | None = None
    calibration: Dataset | None = None

    @property
    def fingerprint(self) -> str:
        return f"{self.train.fingerprint}-{self.val.fingerprint}"


def open_split(config: Config, split: Literal["train", "val"]) -> Dataset:
    """Open one split of the configured data set, for training without the images held out for calibration.

    Raises:
        UserError: the data is missing or damaged, or the class count differs from the configured one.
    """
    if split == "train" and config.data.calibration_fraction:
        return _open_train_and_calibration(config)[0]
    return _open_whole(config, split)


def _open_train_and_calibration(config: Config) -> tuple[Dataset, Dataset]:
    check_calibration_fraction(config)
    whole = _open_whole(config, "train")
    assert not isinstance(whole, SyntheticDataset), "checked above"
    return hold_out(whole, config.data.calibration_fraction)


def _open_whole(config: Config, split: Literal["train", "val"]) -> Dataset:
    check_val_fraction(config)  # `evaluate` opens a split without `validate`
    check_remote(config)
    check_generated(config)
    data = config.data
    spec = dataset_spec(data.dataset)
    if spec.layout == "generated":
        assert data.num_classes is not None, "checked above"
        count = data.synthetic_samples[0 if split == "train" else 1]
        return SyntheticDataset(count, tuple(str(c) for c in range(data.num_classes)))
    default = None if spec.needs_root or is_own(data.dataset) else _digits_root()
    options = _from_section(RemoteOptions, data)
    root = place_of("data.root", data.root, options) if data.root else default
    val_root = place_of("data.val_root", data.val_root, options) if data.val_root else None
    if in_container() and spec.needs_root and root is not None and _is_empty(root):
        raise UserError("data.root", str(root), "is empty", "Mount the data set: docker run -v DIR:/data:ro.")
    index = place_of("data.index", data.index, options) if data.index else None
    dataset = open_dataset(
        data.dataset, root, val_root, data.classes, split, data.imbalance, index, data.val_fraction
    )
    check_num_classes(dataset, data.num_classes)
    if split == "train" and data.label_noise:
        return with_label_noise(dataset, data.label_noise, data.label_noise_seed)
    return dataset


def _is_empty(folder: Path) -> bool:
    try:
        return next(os.scandir(folder), None) is None
    except OSError:  # `open_dataset` reports the problem
        return False


def _digits_root() -> Path:
    """Folder that contains the digits, else the first writable one, else the default."""
    existing = next((root for root in DIGITS_ROOTS if has_digits(root)), None)
    return existing or next((root for root in DIGITS_ROOTS if _can_be_created(root)), DIGITS_ROOTS[0])


def _can_be_created(folder: Path) -> bool:
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    return os.access(parent, os.W_OK | os.X_OK)


def open_data(config: Config, world_size: int) -> DataSplits:
    """Open both splits and validate the configuration.

    Raises:
        UserError: all invalid fields, including missing files. If the settings are invalid, folders are not listed.
    """
    problems = Problems()
    with problems:
        validate(config, world_size)
    if problems:
        with problems:
            check_files(config)
        problems.raise_any()
    if config.data.calibration_fraction:
        train, calibration = _open_train_and_calibration(config)
    else:
        train, calibration = open_split(config, "train"), None
    val = open_split(config, "val")
    if tuple(train.classes) != tuple(val.classes):  # possible only with a user's function
        message = "the splits have different class names"
        raise UserError("data.dataset", config.data.dataset, message, "Return the same classes for both.")
    splits = DataSplits(train, val, tuple(train.classes), groups_of(config, train), calibration)
    validate(config, world_size, sizes_of(splits))
    return splits


def check_files(config: Config) -> None:
    """Check that the files and folders of a configuration exist, without listing or reading a data set.

    Raises:
        UserError: all missing files and folders.
    """
    problems = Problems()
    for split in ("train", "val"):
        with problems:
            _check_folder(config, split)
    with problems:
        check_source_exists(config)
    with problems:
        if config.model.init is not None:
            from dl2pa.model.weight_sources import check_place

            check_place(config.model.init, config.model.backbone)
    problems.raise_any()


def _check_folder(config: Config, split: Literal["train", "val"]) -> None:
    """Open a split only if that fails at once, because its folder is missing."""
    data = config.data
    folder = data.root if split == "train" else data.val_root or data.root
    if is_remote(folder):
        return
    if dataset_spec(data.dataset).needs_root and (folder is None or not Path(folder).is_dir()):
        open_split(config, split)


def log_skipped(splits: DataSplits) -> None:
    """Log the files that are not read, by reason, and the classes without training images."""
    for name, dataset in (("training", splits.train), ("validation", splits.val)):
        skipped = dataset.skipped if isinstance(dataset, ImageTable) else None
        if skipped is not None and skipped.total:
            level = logging.INFO if skipped.only_other_files else logging.WARNING
            log.log(level, "%s data: skipped %s", name, skipped)
    if not isinstance(splits.train, SyntheticDataset):
        empty = empty_classes(splits.train.labels, splits.classes)
        if empty is not None:
            log.warning("training data: %s", empty)


def sizes_of(splits: DataSplits) -> DataSizes:
    """Sizes for ``validate``."""
    side = splits.train.images.shape[1] if isinstance(splits.train, ArrayDataset) else None
    return DataSizes(num_samples(splits.train), num_samples(splits.val), len(splits.classes), side)


def groups_of(config: Config, train: Dataset) -> tuple[Group, ...] | None:
    """Head, medium or tail per class of the training split; None if it is not long-tailed."""
    counts = class_counts(train)
    return None if counts is None else class_groups(counts, config.data.imbalance)


def class_counts(dataset: Dataset) -> NDArray[np.int64] | None:
    """Images per class, shape [C], int64; None for synthetic data."""
    if isinstance(dataset, SyntheticDataset):
        return None
    return np.bincount(dataset.labels, minlength=len(dataset.classes))


def build_transforms(config: Config, train: bool) -> Transforms:
    """Augmentation and normalization of one split."""
    from pipelines.transforms import Transforms

    return _from_section(Transforms, config.data, train=train)


def _from_section(dataclass_type: Callable[..., T], section: DataConfig, **others: Any) -> T:
    """A dataclass whose fields have the values of the equally named config keys, or those of `others`."""
    names = [field.name for field in fields(cast(Any, dataclass_type)) if field.name not in others]
    return dataclass_type(**{name: getattr(section, name) for name in names}, **others)


def build_train_pipeline(config: Config, dataset: Dataset, world: World) -> Pipeline:
    """Pipeline of this rank's training batches."""
    sampler = TrainSampler(
        num_samples(dataset), config.train.batch_size, config.train.seed, world.rank, world.size
    )
    return _build(config, dataset, sampler, True, world.device, world.threads)


def build_eval_pipeline(
    config: Config, dataset: Dataset, world: World, *, of_training: bool = False
) -> Pipeline:
    """Pipeline of this rank's validation batches.

    Args:
        of_training: the images are training images, and have their limit of unreadable ones.
    """
    batch = config.train.eval_batch_size or config.train.batch_size
    sampler = EvalSampler(num_samples(dataset), batch, world.rank, world.size)
    return _build(config, dataset, sampler, False, world.device, world.threads, of_training)


def build_calibration_pipeline(config: Config, dataset: Dataset, world: World) -> Pipeline:
    """Pipeline of this rank's batches of held-out training images, preprocessed as in validation.

    Unreadable ones are left out up to `data.max_bad_fraction`, as in training.
    """
    return build_eval_pipeline(config, dataset, world, of_training=True)


def build_subset_pipeline(
    config: Config,
    dataset: Dataset,
    samples: tuple[int, ...],
    batch: int,
    device: torch.device,
    threads: int,
    *,
    of_training: bool = False,
) -> Pipeline:
    """Pipeline of given samples, preprocessed as in validation, in batches of `batch`; see `build_eval_pipeline`."""
    return _build(config, dataset, SubsetSampler(samples, batch), False, device, threads, of_training)


def _build(
    config: Config,
    dataset: Dataset,
    sampler: Sampler,
    train: bool,
    device: torch.device,
    threads: int,
    of_training: bool = False,
) -> Pipeline:
    from pipelines.build import build_pipeline
    from pipelines.encoded import FaultLimits
    from pipelines.hints import DecoderHints

    return build_pipeline(
        dataset,
        build_transforms(config, train),
        sampler,
        loader=config.loader,
        seed=config.train.seed,
        device=device,
        threads=config.data.threads or threads,
        limits=_from_section(FaultLimits, config.data, of_training=of_training),
        hints=_from_section(DecoderHints, config.data),
    )
