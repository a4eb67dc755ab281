"""Images whose layers are computed, named so that another process can open them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dl2pa.config import Config
from dl2pa.evaluation.layers import Layers, compute_layers, reference_samples
from dl2pa.evaluation.sets import OOD, SET, NamedFolder, config_of_sets, open_sets
from dl2pa.model.compose import join_frozen
from dl2pa.model.inference import load_classifier
from dl2pa.training.data import open_split
from dl2pa.training.distributed import World
from pipelines.dataset import Dataset, num_samples


@dataclass(frozen=True)
class Source:
    """Images of a run or of a folder.

    Attributes:
        kind: training split (`train`), the part of it among which neighbors are searched (`reference`), validation
            split (`val`), or a folder of images with (`set`) or also without (`ood`) classes.
        root: folder, of the last two kinds.
    """

    kind: Literal["train", "reference", "val", "set", "ood"]
    root: str = ""

    @property
    def is_folder(self) -> bool:
        return self.kind in ("set", "ood")

    @property
    def of_training(self) -> bool:
        """Whether the images are training images."""
        return self.kind in ("train", "reference")

    def open(self, config: Config) -> Dataset:
        """Open the images.

        Raises:
            UserError: they are missing or damaged.
        """
        if not self.is_folder:
            return open_split(config, "val" if self.kind == "val" else "train")
        folder = NamedFolder("", Path(self.root))
        (one,) = open_sets(OOD if self.kind == "ood" else SET, [folder], flat=self.kind == "ood")
        return one.images


def compute_sources(
    config: Config,
    model: Path,
    sources: Sequence[tuple[Source, Dataset]],
    world: World,
    with_backbone: bool,
) -> Iterator[Layers]:
    """Compute the layers of each source; with several processes, this rank's share of its batches.

    Folders contain images, so a model of features is joined with its frozen network for them. Unreadable training
    images are left out up to the limit of training.
    """
    classifier = load_classifier(model)
    joined = classifier
    if classifier.takes_features and any(source.is_folder for source, _ in sources):
        joined = join_frozen(load_classifier(model), config).to(world.device)
    classifier = classifier.to(world.device)
    folders = config_of_sets(config, joined)
    for source, dataset in sources:
        samples = reference_samples(num_samples(dataset)) if source.kind == "reference" else None
        chosen = (folders, joined) if source.is_folder else (config, classifier)
        yield compute_layers(*chosen, dataset, world, samples, with_backbone, of_training=source.of_training)
