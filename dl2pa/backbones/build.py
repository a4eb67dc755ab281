"""A backbone by name, with the head that brings its features to the embedding dimension."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dl2pa.backbones.cifar import CifarResNet

_CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56)
TORCHVISION = ("resnet50", "resnet101", "resnet152", "swin_t")
"""The backbones that torchvision builds."""


class Embedder(nn.Module):
    """Backbone and head: images [B, 3, H, W] to embeddings [B, d], not normalized."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def build_embedder(
    backbone: str,
    embedding_dim: int,
    *,
    head: str = "linear",
    shortcut: str = "conv",
    widths: tuple[int, int, int] = (16, 32, 64),
) -> Embedder:
    """Build a CIFAR ResNet or one of torchvision's models, weights drawn anew from torch's generator.

    Args:
        backbone: resnet8/14/20/32/44/56 for small images; resnet50/101/152, swin_t.
        embedding_dim: d.
        head: `linear`, a projection with bias to d; `batchnorm`, BN(d) on the backbone's own d features.
    """
    if is_small(backbone):
        body: nn.Module = CifarResNet(_depth(backbone), widths, shortcut)
        features = widths[-1]
    else:
        body, features = _torchvision(backbone)
    if head == "batchnorm":
        assert features == embedding_dim, "checked with the configuration"
        return Embedder(body, nn.BatchNorm1d(embedding_dim))
    return Embedder(body, nn.Linear(features, embedding_dim))


def is_small(backbone: str) -> bool:
    """Whether it is one of the CIFAR ResNets, for images of 32 pixels or so."""
    return _depth(backbone) in _CIFAR_DEPTHS


def likes_channels_last(backbone: str) -> bool:
    """Whether the memory format pays: convolutional networks, not Swin (timm's published table)."""
    return backbone.startswith("resnet")


def _depth(backbone: str) -> int:
    return int(backbone.removeprefix("resnet")) if backbone.startswith("resnet") else 0


def _torchvision(name: str) -> tuple[nn.Module, int]:
    from torchvision import models

    if name not in TORCHVISION:
        raise ValueError(f"{name!r} is not a known backbone")
    model: Any = getattr(models, name)(weights=None)
    if name.startswith("swin"):
        features = model.head.in_features
        model.head = nn.Identity()
    else:
        features = model.fc.in_features
        model.fc = nn.Identity()
    return model, features
