"""Build embedders from the descriptions in model files, also the frozen network of a feature data set."""

from __future__ import annotations

from typing import Any

from torch import nn

from dl2pa.backbones import Embedder, build_embedder
from dl2pa.backbones.vectors import FrozenBackbone
from dl2pa.specs import MLP

_MLP_KEYS = ("hidden", "hidden_norm", "dropout")
MAX_DIM = 1 << 20
"""Largest feature dimension in a model file, which may be untrusted."""


def model_description(model: Any) -> dict[str, Any]:
    """What a model file contains of section `model`: the keys that the network is built from."""
    others = () if model.backbone == MLP else _MLP_KEYS  # not in the files of other networks
    training = ("init", "freeze_epochs", "freeze_before", "freeze_norm")
    return model.model_dump(mode="json", exclude={*training, *others})


def build_described(model: dict[str, Any], image_size: int, feature_dim: int = 0) -> Embedder:
    """Build the embedder of a ``model_description``."""
    return build_embedder(
        model["backbone"],
        model["embedding_dim"],
        head=model["head"],
        shortcut=model["shortcut"],
        widths=tuple(model["widths"]),
        image_size=image_size,
        feature_dim=feature_dim,
        **{key: model[key] for key in _MLP_KEYS if key in model},
    )


def build_frozen(network: dict[str, Any], image_size: int) -> FrozenBackbone:
    """Build the frozen network, with the PCA if there is one, without its weights.

    Args:
        network: `model`, `dim` and `pca` of a feature data set's record.
    """
    described = {**network["model"], "embedding_dim": 1, "head": "linear"}
    embedder = build_described(described, image_size)
    assert isinstance(embedder.head, nn.Linear), "the head is linear, as described"
    projection = nn.Linear(embedder.head.in_features, network["dim"]) if network["pca"] else None
    return FrozenBackbone(embedder.backbone, projection)


def put_before(frozen: FrozenBackbone, embedder: Embedder, image_size: int) -> Embedder:
    """Join the frozen network and an embedder on its features to an embedder on images."""
    return Embedder(nn.Sequential(frozen, embedder.backbone), embedder.head, (3, image_size, image_size))
