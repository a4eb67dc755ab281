"""Number of micro-batches per step: configured, recorded in a checkpoint, or the fewest that fit in GPU memory."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import distributed as dist

from dl2pa.config import Config
from dl2pa.errors import UserError
from dl2pa.training.distributed import World


def possible_counts(config: Config, world: World) -> list[int]:
    """Numbers of micro-batches that consist of complete virtual shards, ascending."""
    shards = config.virtual_shards // world.size
    return [count for count in range(1, shards + 1) if shards % count == 0]


def count_for_size(config: Config, world: World, size: int) -> int:
    """The smallest number of micro-batches of at most `size` images; otherwise the largest possible number."""
    local, counts = config.train.batch_size // world.size, possible_counts(config, world)
    return next((count for count in counts if local // count <= size), counts[-1])


def fewest_that_fit(config: Config, world: World, rehearse: Callable[[int], None]) -> int:
    """The smallest number of micro-batches with which every process rehearses a step; a collective.

    Args:
        rehearse: run a step in this many micro-batches, without a collective.

    Raises:
        UserError: the smallest micro-batch, one virtual shard, does not fit.
    """
    counts = possible_counts(config, world)
    for count in counts:
        if _all_agree(_fits(rehearse, count), world):
            return count
    batch = config.train.batch_size
    message = f"a micro-batch of {batch // world.size // counts[-1]} images does not fit in the GPU memory"
    remedy = (
        "Set train.checkpoint_activations=true, a larger train.virtual_shards or a smaller data.image_size."
    )
    raise UserError("train.accumulate", "auto", message, remedy)


def _fits(rehearse: Callable[[int], None], count: int) -> bool:
    """Rehearse a step; false if the GPU has too little memory."""
    try:
        rehearse(count)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    gc.collect()  # the frames of the error hold tensors
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return fits


def _all_agree(value: bool, world: World) -> bool:
    if world.size == 1:
        return value
    agreed = torch.tensor([int(value)])
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group=world.side_group)
    return bool(agreed)
