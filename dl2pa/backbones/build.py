"""Build a backbone with a projection head."""

from __future__ import annotations

from pkgutil import resolve_name

from torch import Tensor, nn

from dl2pa.specs import BACKBONES


class Embedder(nn.Module):
    """Backbone and projection head: maps images [B, 3, H, W] to embeddings [B, d], which are not normalized."""

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
    """Build a backbone with random weights from torch's global generator.

    Args:
        backbone: key of `dl2pa.specs.BACKBONES`.
        embedding_dim: d.
        head: `linear`, a projection to d with bias, or `batchnorm`, a BatchNorm of the d features of the backbone.
        shortcut, widths: arguments of `CifarResNet`; other backbones ignore them.

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
