"""Build a backbone with a head that maps its features to the embedding."""

from __future__ import annotations

from pkgutil import resolve_name

from torch import Tensor, nn

from dl2pa.specs import BACKBONES


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
    """Build a backbone of `dl2pa.specs.BACKBONES` with random weights from torch's generator.

    Args:
        backbone: name.
        embedding_dim: d.
        head: `linear`, a projection with bias to d; `batchnorm`, BN(d) on the d features of the backbone.
        shortcut, widths: of CIFAR ResNets (`CifarResNet`).

    Raises:
        ValueError: unknown backbone.
    """
    spec = BACKBONES.get(backbone)
    if spec is None:
        raise ValueError(f"{backbone!r} is not a known backbone")
    build = resolve_name(spec.builder)
    if spec.family == "cifar":
        body: nn.Module = build(spec.depth, widths, shortcut)
    else:
        body = build(weights=None)
        setattr(body, spec.classifier, nn.Identity())
    features = spec.features or widths[-1]
    if head == "batchnorm":
        assert features == embedding_dim, "checked with the configuration"
        return Embedder(body, nn.BatchNorm1d(embedding_dim))
    return Embedder(body, nn.Linear(features, embedding_dim))
