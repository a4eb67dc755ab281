"""Load the frozen network of a feature data set, and join it with a model of its features to classify images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dl2pa.backbones.vectors import FrozenBackbone
from dl2pa.config import Config
from dl2pa.errors import UserError
from dl2pa.model.frozen import build_frozen, put_before
from dl2pa.model.inference import Classifier, load_classifier
from dl2pa.recorded_run import load_run_config
from dl2pa.rundir import RunDirectory
from pipelines.datasets.features import FeatureFolder, check_digest, damaged_features


def load_image_classifier(path: Path) -> Classifier:
    """Load a model that classifies images, from a run directory, an export or a model file.

    The frozen network of a run on features is loaded from its `data.root`.

    Raises:
        UserError: the model is missing or damaged, or its frozen network is.
    """
    classifier = load_classifier(path)
    if not classifier.takes_features:
        return classifier
    if not RunDirectory(path).config.is_file():
        remedy = "Give the run directory, or the folder that `dl2pa export RUN` writes."
        raise UserError("model", str(path), "takes features of a frozen network, not images", remedy)
    return join_frozen(classifier, load_run_config(path, ()))


def join_frozen(classifier: Classifier, config: Config) -> Classifier:
    """Put the frozen network before a classifier of its features.

    Args:
        config: of the run; `data.root` is the feature data set.

    Raises:
        UserError: the feature data set is missing, damaged, or another one than in training (``data.root``).
    """
    folder = FeatureFolder(Path(config.data.root or ""))
    network = folder.read_complete()["network"]
    known = classifier.description["features"]
    if known["digest"] != network["digest"]:
        message = "contains features of another network than the model was trained on"
        raise UserError("data.root", str(folder.root), message, "Restore the folder, or train again.")
    size = network["preprocessing"]["image_size"]
    embedder = put_before(load_frozen(folder), classifier.embedder, size).eval()
    description = {key: value for key, value in classifier.description.items() if key != "features"}
    description["frozen"] = {key: network[key] for key in ("model", "dim", "pca")}
    return Classifier(embedder, classifier.head, description)


def load_network(folder: FeatureFolder, network: dict[str, Any]) -> FrozenBackbone:
    """Load the frozen network without PCA, in evaluation mode.

    Args:
        network: of the record, which need not be complete.

    Raises:
        UserError: the weights differ from the record (``data.root``).
    """
    from safetensors.torch import load_file

    check_digest(folder.backbone, network["sha256"])
    with torch.random.fork_rng(devices=[]):
        frozen = build_frozen({**network, "pca": None}, network["preprocessing"]["image_size"])
    try:
        frozen.network.load_state_dict(load_file(folder.backbone))
    except RuntimeError as error:
        raise damaged_features(folder.backbone, str(error)) from None
    return frozen.eval().requires_grad_(False)


def load_frozen(folder: FeatureFolder) -> FrozenBackbone:
    """Load the frozen network with its PCA, in evaluation mode.

    Raises:
        UserError: the feature data set is incomplete or damaged (``data.root``).
    """
    from safetensors.torch import load_file

    network = folder.read_complete()["network"]
    frozen = load_network(folder, network)
    if network["pca"]:
        check_digest(folder.pca, network["pca"]["sha256"])
        stored = load_file(folder.pca)
        mean, components = stored["mean"].double(), stored["components"].double()
        frozen.projection = nn.Linear(len(mean), len(components)).requires_grad_(False)
        frozen.projection.weight.copy_(components)
        frozen.projection.bias.copy_(-(components @ mean))
    return frozen
