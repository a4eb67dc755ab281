"""Optimizer and learning rate; the rate is a function of the step, so there is no scheduler state to lose."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

import torch
from torch import nn

from dl2pa.config.schema import OptimConfig


def build_optimizer(module: nn.Module, config: OptimConfig, fused: bool) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters, weight decay on matrices and kernels only."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    # Swin's table of relative position biases is a matrix by shape alone.
    is_spared = [not config.decay_all and (p.ndim < 2 or "bias" in name) for name, p in named]
    spared = [p for (_, p), spare in zip(named, is_spared, strict=True) if spare]
    decayed = [p for (_, p), spare in zip(named, is_spared, strict=True) if not spare]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared}]
    hyper = group_settings(config)
    for group, settings in zip(groups, hyper, strict=True):
        group.update(settings)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, fused=fused or None)
    return torch.optim.AdamW(groups, lr=config.lr, fused=fused or None)


def group_settings(config: OptimConfig) -> list[dict[str, object]]:
    """Hyperparameters of the two groups: with weight decay, and without."""
    common: dict[str, object] = (
        {"momentum": config.momentum, "nesterov": config.nesterov and config.momentum > 0}
        if config.name == "sgd"
        else {"betas": config.betas}
    )
    return [{**common, "weight_decay": config.weight_decay}, {**common, "weight_decay": 0.0}]


def apply_settings(optimizer: torch.optim.Optimizer, config: OptimConfig) -> None:
    """Put the configuration's hyperparameters back after a load, which brings those of the checkpoint."""
    for group, settings in zip(optimizer.param_groups, group_settings(config), strict=True):
        group.update(settings)


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Rate for global step `step` (0-based): linear warm-up, then cosine, steps or a constant."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (config.warmup_start + (1.0 - config.warmup_start) * step / warmup)
    if config.schedule == "cosine":
        progress = min(1.0, (step - warmup) / max(1, epochs * steps_per_epoch - warmup))
        return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1.0 + math.cos(math.pi * progress))
    if config.schedule == "step":
        return config.lr * config.gamma ** bisect_right(config.milestones, step // steps_per_epoch)
    return config.lr
