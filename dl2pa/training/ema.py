"""Exponential moving average of the weights, without a host sync a step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from dl2pa.model.model import Model


class ModelEma:
    """A twin of the trainee whose parameters follow by (1 - decay) a step; the first step copies them."""

    def __init__(self, model: Model, decay: float) -> None:
        self.module = copy.deepcopy(model)
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        self._decay = decay
        self._steps = 0

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """Follow the parameters by one step."""
        ours: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = [p.detach() for p in model.parameters()]
        weight = 1.0 - self._decay if self._steps else 1.0
        torch._foreach_lerp_(ours, theirs, weight)  # pyright: ignore[reportPrivateUsage]
        self._steps += 1

    @torch.no_grad()
    def copy_buffers(self, model: Model) -> None:
        """Take over what is not averaged: BatchNorm's statistics, prototypes and assignment."""
        for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        return {"parameters": list(self.module.parameters()), "steps": self._steps}

    @torch.no_grad()
    def load(self, state: dict[str, Any] | None, model: Model) -> None:
        """Restore; where there is no state (`train.ema` is new), start from the trainee."""
        source = list(model.parameters()) if state is None else state["parameters"]
        for ours, theirs in zip(self.module.parameters(), source, strict=True):
            ours.copy_(theirs)
        self._steps = 0 if state is None else state["steps"]
        self.copy_buffers(model)
