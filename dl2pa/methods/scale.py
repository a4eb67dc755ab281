"""Logit scale, fixed or learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_DAMPING = 0.1
_RANGE = 10.0


class Scale(nn.Module):
    """Scale s in softmax(s · scores).

    If learned, s = s₀ exp(t/10) with a scalar parameter t that starts at 0, so s is positive and changes by relative
    steps (like CLIP's temperature exp(t); Radford et al., ICML 2021). The factor 1/10, with which SGD changes log s a
    hundred times more slowly, and the range from s₀/10 to 10 s₀ are additions: early in training, reducing s is the
    fastest way to reduce the loss, but it also reduces all other gradients. Without the factor, s reached its lower
    limit after one epoch of the digits data set (29 steps) and nothing was learned.

    Args:
        value: s₀.
        learned: whether s is trained.
    """

    def __init__(self, value: float, learned: bool) -> None:
        super().__init__()
        self._value = value
        self.shift: nn.Parameter | None = nn.Parameter(torch.zeros(())) if learned else None

    def forward(self) -> float | Tensor:
        return self._value if self.shift is None else self._value * (_DAMPING * self.shift).exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamp s to its range, after an optimizer step."""
        if self.shift is not None:
            limit = math.log(_RANGE) / _DAMPING
            self.shift.clamp_(-limit, limit)
