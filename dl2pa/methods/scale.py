"""The factor between scores and logits: given, or learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_DAMPING = 0.1
_RANGE = 10.0


class Scale(nn.Module):
    """s in softmax(s · scores).

    Learned, s = s₀ exp(t/10) with t a parameter of no dimension that starts at 0: positive, and a step changes it by a
    share of itself (as CLIP's temperature exp(t); Radford et al., ICML 2021). Ours are the tenth, by which SGD moves
    log s a hundred times more slowly than by t itself, and the range from s₀/10 to 10 s₀. While the features say
    little, the quickest way to a smaller loss is a smaller s, and with s the gradient of everything else dies out:
    without the tenth s was at the lower end after one epoch of the digits (29 steps) and nothing was learned.

    Args:
        value: s₀.
        learned: whether gradient descent moves it.
    """

    def __init__(self, value: float, learned: bool) -> None:
        super().__init__()
        self._value = value
        self.shift: nn.Parameter | None = nn.Parameter(torch.zeros(())) if learned else None

    def forward(self) -> float | Tensor:
        return self._value if self.shift is None else self._value * (_DAMPING * self.shift).exp()

    @torch.no_grad()
    def restrain(self) -> None:
        """After an optimizer step: bring s back into its range."""
        if self.shift is not None:
            reach = math.log(_RANGE) / _DAMPING
            self.shift.clamp_(-reach, reach)
