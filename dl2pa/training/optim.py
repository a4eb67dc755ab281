"""Optimizer and learning rate. The rate is a function of the step, so there is no scheduler state to save."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from dl2pa.config.schema import MOMENTUM_OPTIMIZERS, TIMM_OPTIMIZERS, OptimConfig
from dl2pa.training.param_groups import param_groups


def build_optimizer(module: nn.Module, config: OptimConfig, fused: bool) -> torch.optim.Optimizer:
    """Build the optimizer over the trainable parameters, in the groups of `param_groups`; lars and lamb are timm's."""
    parameters = dict(module.named_parameters())
    groups: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in group.names],
            "decays": group.decays,
            "lr_scale": group.lr_scale,
            **group_settings(config, group.decays),
        }
        for group in param_groups(module, config)
    ]
    if config.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.lr, fused=fused or None)
        if fused and config.momentum:
            _init_momentum(optimizer)
        return optimizer
    if config.name in TIMM_OPTIMIZERS:
        from timm.optim import create_optimizer_v2

        # LAMB would clip the gradients a second time.
        options: dict[str, Any] = {"max_grad_norm": None} if config.name == "lamb" else {}
        groups = [{**group, "always_adapt": group["decays"]} for group in groups]  # also without weight decay
        return create_optimizer_v2(groups, config.name, config.lr, **options)
    return torch.optim.AdamW(groups, lr=config.lr, fused=fused or None)


def _init_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Set the momentum to zero, which gives the same first step as no momentum.

    The fused kernel allocates momentum without initializing it at the first step. If that step is skipped because its
    fp16 gradients overflow, the next step would use the uninitialized memory.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], config: OptimConfig) -> None:
    """Load a saved state for the device, memory format and hyperparameters of this attempt.

    Args:
        state: a state dict, whose tensors may come from another device or memory format.
    """
    fused = [group.get("fused") for group in optimizer.param_groups]
    own = [{key: group[key] for key in ("decays", "lr_scale")} for group in optimizer.param_groups]
    # With `fused` set, torch moves the step count to the parameters' device.
    groups = [{**group, "fused": value} for group, value in zip(state["param_groups"], fused, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    # A load replaces the hyperparameters by those of the checkpoint.
    for group, kept in zip(optimizer.param_groups, own, strict=True):
        group.update({**kept, **group_settings(config, bool(kept["decays"]))})


def group_settings(config: OptimConfig, decays: bool) -> dict[str, object]:
    """Hyperparameters of a parameter group with or without weight decay."""
    common: dict[str, object] = (
        {"momentum": config.momentum, "nesterov": config.nesterov and config.momentum > 0}
        if config.name in MOMENTUM_OPTIMIZERS
        else {"betas": config.betas}
    )
    return {**common, "weight_decay": config.weight_decay if decays else 0.0}


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate of a 0-based global step: linear warm-up, then cosine, step or constant schedule."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (config.warmup_start + (1.0 - config.warmup_start) * step / warmup)
    if config.schedule == "cosine":
        progress = min(1.0, (step - warmup) / max(1, epochs * steps_per_epoch - warmup))
        return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1.0 + math.cos(math.pi * progress))
    if config.schedule == "step":
        epoch = step // steps_per_epoch
        return config.lr * config.gamma ** sum(milestone <= epoch for milestone in config.milestones)
    return config.lr
