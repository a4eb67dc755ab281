"""Build a backbone with a projection head."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Self

from torch import Tensor, nn

from dl2pa.backbones.libraries import build_library_backbone
from dl2pa.errors import UserError
from dl2pa.specs import backbone_spec


class Embedder(nn.Module):
    """Backbone and projection head: maps images [B, 3, H, W] to embeddings [B, d], which are not normalized."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.frozen = False
        """Whether the backbone stays in evaluation mode: fixed BatchNorm statistics, no dropout."""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def build_embedder(
    backbone: str,
    embedding_dim: int,
    *,
    head: str = "linear",
    shortcut: str = "conv",
    widths: tuple[int, int, int] = (16, 32, 64),
    image_size: int = 224,
) -> Embedder:
    """Build a backbone with random weights from torch's global generator.

    Args:
        backbone: name as in `model.backbone`.
        embedding_dim: d.
        head: `linear`, a projection to d with bias, or `batchnorm`, a BatchNorm of the d features of the backbone.
        shortcut, widths: arguments of `CifarResNet`; other backbones ignore them.
        image_size: side of the images, for networks of a fixed size such as vision transformers.

    Raises:
        UserError: unknown backbone, or one that does not accept this image size.
    """
    spec = backbone_spec(backbone)
    if spec.family == "cifar":
        body: nn.Module = resolve_name(spec.builder)(spec.depth, widths, shortcut)
        features = widths[-1]
    else:
        body, features = build_library_backbone(backbone, spec, image_size)
    if head == "batchnorm":
        if features != embedding_dim:
            message = f"must be {features}, the dimension of the features, with model.head=batchnorm"
            remedy = f"Set model.embedding_dim={features}, or model.head=linear."
            raise UserError("model.embedding_dim", embedding_dim, message, remedy)
        return Embedder(body, nn.BatchNorm1d(embedding_dim))
    return Embedder(body, nn.Linear(features, embedding_dim))
