"""Base class of methods with learned class vectors: softmax cross-entropy of the head's logits."""

from __future__ import annotations

import torch
from torch import Tensor

from dl2pa.methods.base import Method
from dl2pa.methods.losses import ntce
from dl2pa.methods.options import MethodOptions
from dl2pa.methods.scale import Scale
from dl2pa.methods.targets import Targets


class LearnedMethod(Method):
    """Method with loss CE(logits − s·m·onehot(y) + τ·log π): scale s, margin m, adjustment τ; with label smoothing.

    Args:
        scaled: whether the logits are scores times a scale; otherwise s = 1 and m = 0.
    """

    def __init__(self, num_classes: int, dim: int, options: MethodOptions, *, scaled: bool = True) -> None:
        super().__init__(num_classes, dim, options)
        self.scale = Scale(options.scale, options.learn_scale) if scaled else Scale(1.0, learned=False)
        self._margin = options.margin if scaled else 0.0

    def loss(self, features: Tensor, targets: Targets) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            if self.options.loss == "ntce":
                return ntce(self.head(), features, targets)
            margin = self._margin * self.scale() if self._margin else 0.0
            return self.cross_entropy(features, targets, self.options.label_smoothing, margin)

    def observe(self, features: Tensor, targets: Targets, pooled: Tensor | None = None) -> None:
        self.scale.clamp()
