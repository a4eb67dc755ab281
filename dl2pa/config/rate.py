"""Learning rate of a configuration in words."""

from __future__ import annotations

from dl2pa.config.schema import LR_BATCH, Config


def describe_rate(config: Config) -> str:
    """Peak rate with the scaling rule, warm-up and schedule, in one line."""
    optim, batch = config.optim, config.train.batch_size
    peak = config.scaled_optim.lr
    if optim.lr_scaling == "none":
        text = f"{peak:g} for the global batch of {batch} (not scaled)"
    else:
        text = (
            f"{peak:g} for the global batch of {batch}: {optim.lr_scaling} scaling of "
            f"optim.lr = {optim.lr:g} for {LR_BATCH} images"
        )
    if optim.warmup_epochs:
        length = f"{optim.warmup_epochs:g} epoch{'s' * (optim.warmup_epochs != 1)}"
        text += f"; linear warm-up from {peak * optim.warmup_start:g} over {length}"
    schedules = {
        "cosine": f"cosine schedule to {optim.min_lr:g} at epoch {config.train.epochs}",
        "step": f"times {optim.gamma:g} after epochs {', '.join(map(str, optim.milestones)) or 'none'}",
        "constant": "then constant",
    }
    return f"{text}; {schedules[optim.schedule]}"
