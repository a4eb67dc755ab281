"""Parameter groups of the optimizer: weight decay, and a factor of the learning rate per layer and for the head."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from dl2pa.backbones import layer_numbers
from dl2pa.config.schema import OptimConfig

_BACKBONE = re.compile(r"^(?:embedder\.)?backbone\.")


@dataclass(frozen=True)
class ParamGroup:
    """Parameters with the same hyperparameters.

    Attributes:
        names: names of the parameters.
        lr_scale: factor of the learning rate.
        decays: whether `optim.weight_decay` applies.
    """

    names: tuple[str, ...]
    lr_scale: float
    decays: bool


def param_groups(module: nn.Module, config: OptimConfig) -> list[ParamGroup]:
    """Group the trainable parameters, from the first layer to the head; each layer with and then without decay.

    Without `optim.layer_decay` and `optim.head_lr_scale` there are two groups.

    Args:
        module: a module with the embedder's parameters, or the embedder itself, or any network.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    scales = _lr_scales(module, config, [name for name, _ in trainable])
    groups: dict[tuple[float, bool], list[str]] = {}
    for scale in sorted(set(scales.values())) or [1.0]:
        groups |= {(scale, True): [], (scale, False): []}
    for name, p in trainable:
        # Swin's relative position bias table has the shape of a matrix, but is a bias.
        skip = not config.decay_all and (p.ndim < 2 or "bias" in name)
        groups[scales[name], not skip].append(name)
    is_plain = len(groups) == 2
    return [
        ParamGroup(tuple(names), scale, decays)
        for (scale, decays), names in groups.items()
        if names or is_plain
    ]


def _lr_scales(module: nn.Module, config: OptimConfig, names: list[str]) -> dict[str, float]:
    """Factor of the learning rate per parameter: layer_decay^(layers to the head), and that of the head."""
    layers: dict[str, int] = {}
    if config.layer_decay != 1.0:
        embedder = getattr(module, "embedder", module)
        layers = layer_numbers(embedder.get_submodule("backbone"))
    depth = max(layers.values(), default=-1) + 1
    scales: dict[str, float] = {}
    for name in names:
        inner = _BACKBONE.sub("", name)
        if inner == name:
            scales[name] = config.head_lr_scale
        else:
            scales[name] = config.layer_decay ** (depth - layers.get(inner, 0)) if layers else 1.0
    return scales
