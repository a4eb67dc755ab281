"""Named sets of images and what is measured on them. Opening a set imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dl2pa.config import Config
from dl2pa.errors import UserError
from dl2pa.specs import IMAGE_FOLDER, dataset_spec
from pipelines.datasets import ImageTable
from pipelines.datasets.evaluation import open_images, with_model_classes

if TYPE_CHECKING:
    from dl2pa.model.inference import Classifier
    from dl2pa.training.distributed import World
    from dl2pa.training.evaluate import Evaluation

SET, OOD = "--set", "--ood"
_FOLDERS = ("ood", "retrieval")
"""Folders of records in `RUN/evaluations/`."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class NamedFolder:
    """One value NAME=DIR of an option."""

    name: str
    root: Path


@dataclass(frozen=True, eq=False)
class NamedSet:
    """Open images of a named folder."""

    name: str
    root: Path
    images: ImageTable


@dataclass(frozen=True, eq=False)
class LabeledSet:
    """Images labeled by the classes of a model.

    Attributes:
        images: N images; their K classes are those that predictions choose from.
        kept: labels [K] of these classes in the model.
    """

    name: str
    root: Path
    images: ImageTable
    kept: NDArray[np.int64]


def parse_folders(option: str, values: Sequence[str]) -> list[NamedFolder]:
    """Parse values NAME=DIR of a repeated option.

    Raises:
        UserError: another form, a name that cannot be part of a file name, or one that appears twice.
    """
    folders: list[NamedFolder] = []
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or not folder:
            raise UserError(option, value, "is not of the form NAME=DIR", f"Give {option} NAME=DIR.")
        if not _NAME.fullmatch(name):
            message = f"the name {name!r} does not consist of letters, digits, '.', '_' and '-'"
            raise UserError(option, value, message, "Choose another name, for example imagenet-r.")
        if name in _FOLDERS:
            raise UserError(option, value, f"the name {name!r} is reserved", "Choose another name.")
        if any(name == other.name for other in folders):
            raise UserError(option, value, f"the name {name!r} appears twice", "Give each set its own name.")
        folders.append(NamedFolder(name, Path(folder).expanduser()))
    return folders


def open_sets(option: str, folders: Sequence[NamedFolder], *, flat: bool = False) -> list[NamedSet]:
    """Open every set.

    Args:
        flat: also accept folders of images without classes.

    Raises:
        UserError: a folder is missing or cannot be used.
    """
    return [NamedSet(one.name, one.root, open_images(one.root, option, flat=flat)) for one in folders]


def label_sets(sets: Sequence[NamedSet], classes: list[str], *, only_present: bool) -> list[LabeledSet]:
    """Label every set by the classes of the model, see ``with_model_classes``."""
    result: list[LabeledSet] = []
    for one in sets:
        images, kept = with_model_classes(one.images, classes, one.name, SET, only_present=only_present)
        result.append(LabeledSet(one.name, one.root, images, kept))
    return result


def config_of_sets(config: Config, classifier: Classifier) -> Config:
    """Configuration that prepares images of files as the validation of the run prepares its images."""
    layout = dataset_spec(config.data.dataset).layout
    data: dict[str, object] = {"dataset": IMAGE_FOLDER}
    if layout == "features":
        prepared = classifier.description["preprocessing"]
        data |= {"loader": "auto", "image_size": prepared["image_size"], "mean": tuple(prepared["mean"])}
        data |= {"eval_resize": prepared["resize_shorter_side"], "std": tuple(prepared["std"])}
        data["interpolation"] = prepared.get("interpolation", "bilinear")
    elif layout == "generated":
        data |= {"loader": "auto", "eval_resize": config.data.image_size}
    else:
        data["loader"] = config.loader
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def evaluate_set(config: Config, classifier: Classifier, one: LabeledSet, world: World) -> Evaluation:
    """Classify every image of a set exactly once over all ranks; a collective.

    Args:
        config: of the run.
        classifier: a model of images, on the device.

    Raises:
        UserError: more unreadable images than allowed, or the network does not accept their size.
    """
    import torch

    from dl2pa.evaluation.sizes import check_image_size
    from dl2pa.training.data import build_eval_pipeline
    from dl2pa.training.evaluate import Likelihood, evaluate
    from dl2pa.training.train_state import autocast

    kept = torch.from_numpy(one.kept).to(world.device)
    whole = len(one.kept) == len(classifier.classes)

    def score(images: torch.Tensor) -> torch.Tensor:
        logits = classifier.score(images)
        return logits if whole else logits[:, kept]

    groups = classifier.groups
    prepared = config_of_sets(config, classifier)
    check_image_size(prepared, classifier)
    pipeline = build_eval_pipeline(prepared, one.images, world)
    try:
        with autocast(config.train.precision, world.device):
            result = evaluate(
                score,
                pipeline,
                len(one.kept),
                groups=None if groups is None else [groups[label] for label in one.kept.tolist()],
                likelihood=Likelihood(classifier.fitted_temperature),
            )
    finally:
        pipeline.close()
    assert result is not None, "only training stops an evaluation"
    return result
