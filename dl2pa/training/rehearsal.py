"""Parts of a forward and backward pass on noise, whose results are discarded."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from dl2pa.config import Config
from dl2pa.methods import Method, Targets
from dl2pa.model.model import Model
from dl2pa.training.distributed import World
from dl2pa.training.negatives import with_negatives

_SPARE = 0.05
"""Share of the GPU memory that stays free for decoding and fragmentation."""


def noise_images(model: Model, world: World, count: int) -> Tensor:
    """`count` images or feature vectors of noise from torch's global generator, on the device."""
    return torch.randn(count, *model.embedder.input_shape, device=world.device)


def noise_targets(config: Config, world: World, method: Method, count: int) -> Targets:
    """Labels of `count` images, mixed if the configuration mixes."""
    labels = torch.arange(count, device=world.device) % method.num_classes
    if not (config.train.mixup or config.train.cutmix):
        targets = Targets(labels)
    else:
        targets = Targets(labels, labels, torch.full((count,), 0.5, device=world.device))
    return with_negatives(method, targets, config.train.seed, 0)


@contextmanager
def discarded(model: Model, optimizer: torch.optim.Optimizer) -> Generator[None]:
    """Enter training mode; at the end discard the gradients and the changes of the embedder's buffers."""
    # Methods change their buffers in `observe` only.
    saved = [(b, b.clone()) for b in model.embedder.buffers()]
    model.train()
    try:
        yield
    finally:
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def later_memory(
    optimizer: torch.optim.Optimizer, world: World, images: Tensor, targets: Targets
) -> list[Tensor]:
    """Tensors of the size of what a step needs beyond a pass: state of the optimizer, DDP's buckets, other images."""
    images_count = 2 if targets.second is None else 4  # read ahead; the mixed images and their partners
    result = [torch.empty_like(images) for _ in range(images_count)]
    for group in optimizer.param_groups:
        moments = 2 if "betas" in group else 1
        for p in group["params"]:
            copies = (0 if optimizer.state else moments) + (world.size > 1)
            result += [torch.empty_like(p) for _ in range(copies)]
    if world.device.type == "cuda":
        total = torch.cuda.mem_get_info(world.device)[1]
        result.append(torch.empty(int(_SPARE * total), dtype=torch.uint8, device=world.device))
    return result
