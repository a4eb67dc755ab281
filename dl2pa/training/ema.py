"""Exponential moving average of the weights, without a host sync per step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from dl2pa.model.model import Model


class ModelEma:
    """A copy of the model whose parameters move by (1 - decay) per step; the first step copies them."""

    def __init__(self, model: Model, decay: float) -> None:
        self.module = copy.deepcopy(model)
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        self._decay = decay
        self._steps = 0

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """Move toward the model's parameters by one step."""
        averages: list[Tensor] = list(self.module.parameters())
        parameters: list[Tensor] = [p.detach() for p in model.parameters()]
        weight = 1.0 - self._decay if self._steps else 1.0
        torch._foreach_lerp_(averages, parameters, weight)  # pyright: ignore[reportPrivateUsage]
        self._steps += 1

    @torch.no_grad()
    def copy_buffers(self, model: Model) -> None:
        """Copy what is not averaged: BatchNorm statistics, prototypes and assignment."""
        for target, source in zip(self.module.buffers(), model.buffers(), strict=True):
            target.copy_(source)

    def state_dict(self) -> dict[str, Any]:
        return {"parameters": list(self.module.parameters()), "steps": self._steps}

    @torch.no_grad()
    def load(self, state: dict[str, Any] | None, model: Model) -> None:
        """Restore the average; without a state (`train.ema` was just enabled) start from the model."""
        parameters = list(model.parameters()) if state is None else state["parameters"]
        for target, source in zip(self.module.parameters(), parameters, strict=True):
            target.copy_(source)
        self._steps = 0 if state is None else state["steps"]
        self.copy_buffers(model)
