"""Classifier head: maps embeddings to logits without the training method."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Norm(NamedTuple):
    """Gain and bias of a LayerNorm, both [d] or [C]."""

    gain: Tensor
    bias: Tensor


class ClassifierHead(NamedTuple):
    """Maps features [B, d] to logits [B, C]; differentiable in its tensors.

    Attributes:
        vectors: [C·K, d]; rows cK … cK+K−1 belong to class c.
        scale: factor of the scores.
        normalize: normalize the features; with unit vectors the scores are cosines.
        per_class: K; the score of a class is the maximum over its vectors.
        bias: [C], added to the scores; only with K = 1 and scale 1.
        feature_norm: LayerNorm applied to the features first.
        class_norm: LayerNorm over the classes applied to the scores last.
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
        """Split into heads of `classes` consecutive classes each; not for a head with `class_norm`.

        Tensors are split once, so that the backward pass concatenates the gradients of the blocks once.
        """
        vectors = self.vectors.split(classes * self.per_class)
        biases = [None] * len(vectors) if self.bias is None else self.bias.split(classes)
        return [self._replace(vectors=v, bias=b) for v, b in zip(vectors, biases, strict=True)]

    def layer_norm(self, features: Tensor) -> Tensor:
        """Features [B, d] in float32 after the LayerNorm, if there is one."""
        features = features.float()
        if self.feature_norm is not None:
            features = F.layer_norm(features, features.shape[1:], *self.feature_norm)
        return features

    def embed(self, features: Tensor) -> Tensor:
        """Features [B, d] as multiplied with the vectors: float32 and normalized."""
        features = self.layer_norm(features)
        return F.normalize(features, dim=1) if self.normalize else features

    def logits(self, features: Tensor) -> Tensor:
        """Logits [B, C] in float32, also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            scores = self.scale * F.linear(self.embed(features), self.vectors.float(), bias)
            if self.per_class > 1:
                scores = scores.unflatten(1, (-1, self.per_class)).amax(dim=2)
            if self.class_norm is not None:
                scores = F.layer_norm(scores, scores.shape[1:], *self.class_norm)
            return scores
