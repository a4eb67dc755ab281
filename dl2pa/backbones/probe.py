"""Properties of a network found by a forward pass or by its layers: feature dimension, randomness, memory format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

_CONVOLUTIONAL_SHARE = 0.1
"""Share of convolutions among the weighted layers from which channels_last pays: transformers have one, of patches."""


@dataclass(frozen=True)
class ForwardTraits:
    """Traits of a forward pass in training mode.

    Attributes:
        shape: shape of the output for two images; None if it is not one tensor.
        draws_random_numbers: whether it drew from a generator of torch, as dropout and stochastic depth do.
    """

    shape: tuple[int, ...] | None
    draws_random_numbers: bool


class _RandomOperators(TorchDispatchMode):
    """Notes whether an operator that draws from a generator was called."""

    def __init__(self) -> None:
        super().__init__()
        self.called = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.called |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def probe_forward(network: nn.Module, shape: int | tuple[int, ...]) -> ForwardTraits:
    """Run a network in training mode on two inputs of shapes only; weights, statistics and generators are unchanged.

    A network that needs values, for example for control flow, computes two inputs on its device.

    Args:
        shape: shape of one input, or the side of an image.

    Raises:
        Exception: the network does not accept inputs of this shape.
    """
    shape = (3, shape, shape) if isinstance(shape, int) else shape
    modes = {module: module.training for module in network.modules()}
    try:
        network.train()
        try:
            return _forward(network, shape, torch.device("meta"))
        except Exception:
            return _forward(network, shape, next(network.parameters()).device)
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def _forward(network: nn.Module, shape: tuple[int, ...], device: torch.device) -> ForwardTraits:
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    if device.type == "meta":
        replaced: Mapping[str, Tensor] = {
            name: torch.empty_like(t, device=device) for name, t in tensors.items()
        }
    else:
        replaced = {name: tensor.clone() for name, tensor in network.named_buffers()}
    images = torch.zeros(2, *shape, device=device)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        _RandomOperators() as operators,
    ):
        output: object = functional_call(network, dict(replaced), (images,))
    output_shape = tuple(output.shape) if isinstance(output, Tensor) else None
    return ForwardTraits(output_shape, operators.called)


def prefers_channels_last(network: nn.Module) -> bool:
    """Whether channels_last is faster: for convolutional networks, not for transformers and MLPs."""
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    linear = sum(isinstance(module, nn.Linear) for module in network.modules())
    return convolutions > _CONVOLUTIONAL_SHARE * (convolutions + linear)
