"""PSC: the parametric softmax classifier, learned with the backbone: the baseline of the published tables.

Two forms: linear, softmax(W f + b), and normalised, softmax(s · cos(f, w_c)). The published rows behave like the
normalised form without a scale (s = 1), which cannot fit; with s = 14 it is the strong baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dl2pa.methods.base import Method, cosines
from dl2pa.methods.losses import cross_entropy
from dl2pa.methods.targets import Targets


class Psc(Method):
    """Learned class vectors [C, d].

    Args:
        normalize: cosines times `scale`, without a bias; else W f + b.
    """

    def __init__(
        self, num_classes: int, dim: int, *, normalize: bool, scale: float, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(num_classes, dim)
        self.normalize = normalize
        self._scale = scale
        self.label_smoothing = label_smoothing
        self.weight = nn.Parameter(torch.randn(num_classes, dim) / dim**0.5)
        self.bias = None if normalize else nn.Parameter(torch.zeros(num_classes))

    def loss(self, features: Tensor, targets: Targets) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return cross_entropy(self.logits(features.float()), targets, self.label_smoothing)

    def logits(self, features: Tensor) -> Tensor:
        if self.normalize:
            return self._scale * cosines(features, F.normalize(self.weight, dim=1))
        return F.linear(features.float(), self.weight, self.bias)

    def scale(self) -> float | None:
        return self._scale if self.normalize else None

    def class_vectors(self) -> Tensor:
        return F.normalize(self.weight.detach(), dim=1)
