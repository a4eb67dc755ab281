"""What turns embeddings into logits: tensors and numbers, so that a trained model needs no method to predict."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Norm(NamedTuple):
    """LayerNorm's gain and bias, both [d] or [C]."""

    gain: Tensor
    bias: Tensor


class ClassifierHead(NamedTuple):
    """Logits [B, C] of features [B, d]; differentiable in whatever its tensors are.

    Attributes:
        vectors: [C·K, d]; rows cK … cK+K−1 belong to class c.
        scale: factor of the scores.
        normalize: scale the features to length 1; with unit vectors the scores are cosines.
        per_class: K; a class's score is that of its best vector.
        bias: [C], added to the scores (only with K = 1 and no scale).
        feature_norm: LayerNorm of the features before all else.
        class_norm: LayerNorm of the scores over the classes after all else.
    """

    vectors: Tensor
    scale: float | Tensor = 1.0
    normalize: bool = True
    per_class: int = 1
    bias: Tensor | None = None
    feature_norm: Norm | None = None
    class_norm: Norm | None = None

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.vectors) // self.per_class

    def split(self, classes: int) -> list[ClassifierHead]:
        """Readouts of consecutive blocks of so many classes; not for a LayerNorm over the classes.

        The gradients of the blocks are put together in one pass.
        """
        vectors = self.vectors.split(classes * self.per_class)
        biases = [None] * len(vectors) if self.bias is None else self.bias.split(classes)
        return [self._replace(vectors=v, bias=b) for v, b in zip(vectors, biases, strict=True)]

    def embed(self, features: Tensor) -> Tensor:
        """Features [B, d] as the vectors see them: float32, normalized as this readout does it."""
        features = features.float()
        if self.feature_norm is not None:
            features = F.layer_norm(features, features.shape[1:], *self.feature_norm)
        return F.normalize(features, dim=1) if self.normalize else features

    def logits(self, features: Tensor) -> Tensor:
        """[B, C] in float32, autocast or not."""
        with torch.autocast(features.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            scores = self.scale * F.linear(self.embed(features), self.vectors.float(), bias)
            if self.per_class > 1:
                scores = scores.unflatten(1, (-1, self.per_class)).amax(dim=2)
            if self.class_norm is not None:
                scores = F.layer_norm(scores, scores.shape[1:], *self.class_norm)
            return scores
