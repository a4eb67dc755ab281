"""The factor between scores and logits: given, or learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Scale(nn.Module):
    """s in softmax(s · scores).

    Learned, s = exp(t) with t a parameter of no dimension, so that s stays positive and a step changes it by a share
    of itself (as CLIP's temperature; Radford et al., ICML 2021). Ours: no upper limit, no weight decay on t (none on
    any one-dimensional parameter unless `optim.decay_all`).

    Args:
        value: s at the start.
        learned: whether gradient descent moves it.
    """

    def __init__(self, value: float, learned: bool) -> None:
        super().__init__()
        self._value = value
        self.log: nn.Parameter | None = nn.Parameter(torch.tensor(math.log(value))) if learned else None

    def forward(self) -> float | Tensor:
        return self._value if self.log is None else self.log.exp()
