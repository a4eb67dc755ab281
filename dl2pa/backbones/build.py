"""Build a backbone with a projection head."""

from __future__ import annotations

from collections.abc import Sequence
from pkgutil import resolve_name
from typing import Self

from torch import Tensor, nn

from dl2pa.backbones.layers import modules_before, parameters_before
from dl2pa.backbones.libraries import build_library_backbone
from dl2pa.backbones.norms import running_norms
from dl2pa.backbones.vectors import build_mlp
from dl2pa.errors import UserError
from dl2pa.specs import MLP, backbone_spec


class Embedder(nn.Module):
    """Backbone and projection head: maps images [B, 3, H, W] to embeddings [B, d], which are not normalized.

    Args:
        input_shape: shape of one input: (3, S, S), or (D,) for a backbone on feature vectors [B, D].
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Linear | nn.BatchNorm1d, input_shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.backbone = backbone
        self.head: nn.Linear | nn.BatchNorm1d = head
        self.frozen = False
        """Whether the backbone stays in evaluation mode: fixed BatchNorm statistics, no dropout."""
        self.freeze_norm = False
        """Whether layers of the backbone with running statistics stay in evaluation mode."""
        self._frozen_before: str | None = None

    @property
    def pooled_dim(self) -> int:
        """Dimension of the features of the backbone."""
        return self.head.in_features if isinstance(self.head, nn.Linear) else self.head.num_features

    def freeze_before(self, name: str) -> None:
        """Fix the weights of the layers before a module of the backbone, and keep them in evaluation mode.

        Raises:
            UserError: the backbone has no such module, or no layers before it.
        """
        for parameter in parameters_before(self.backbone, name):
            parameter.requires_grad_(False)
        self._frozen_before = name

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        elif self.freeze_norm:
            for layer in running_norms(self.backbone):
                layer.eval()
        if self._frozen_before is not None:
            for part in modules_before(self.backbone, self._frozen_before):
                part.eval()
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
    hidden: Sequence[int] = (512,),
    hidden_norm: str = "none",
    dropout: float = 0.0,
    feature_dim: int = 0,
) -> Embedder:
    """Build a backbone with random weights from torch's global generator.

    Args:
        backbone: name as in `model.backbone`.
        embedding_dim: d.
        head: `linear`, a projection to d with bias, or `batchnorm`, a BatchNorm of the d features of the backbone.
        shortcut, widths: arguments of `CifarResNet`; other backbones ignore them.
        image_size: side of the images, for networks of a fixed size such as vision transformers.
        hidden, hidden_norm, dropout: arguments of `build_mlp` for the backbone `mlp`.
        feature_dim: D of the feature vectors, for `mlp` and `identity`.

    Raises:
        UserError: unknown backbone, or one that does not accept this image size.
    """
    spec = backbone_spec(backbone)
    input_shape: tuple[int, ...] = (3, image_size, image_size)
    if spec.takes_features:
        layers = hidden if backbone == MLP else ()
        body: nn.Module = build_mlp(feature_dim, layers, hidden_norm, dropout)
        features, input_shape = (feature_dim, *layers)[-1], (feature_dim,)
    elif spec.family == "cifar":
        body = resolve_name(spec.builder)(spec.depth, widths, shortcut)
        features = widths[-1]
    else:
        body, features = build_library_backbone(backbone, spec, image_size)
    if head == "batchnorm":
        if features != embedding_dim:
            message = f"must be {features}, the dimension of the features, with model.head=batchnorm"
            remedy = f"Set model.embedding_dim={features}, or model.head=linear."
            raise UserError("model.embedding_dim", embedding_dim, message, remedy)
        return Embedder(body, nn.BatchNorm1d(embedding_dim), input_shape)
    return Embedder(body, nn.Linear(features, embedding_dim), input_shape)
