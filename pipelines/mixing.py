"""mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019) on the device, after the pipeline.

Everything is drawn on the host from (seed, step, position in the global batch), and a sample's partner lies
in its own virtual shard, so that any number of processes mixes the same global batch to the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv
from torch import Tensor

from pipelines import rng
from pipelines.batch import host_to_device
from pipelines.erasing import box_mask
from pipelines.rng import Stream


@dataclass(frozen=True)
class MixDraw:
    """How the b samples of a rank are mixed; all arrays live on the host."""

    kind: Literal["mixup", "cutmix"]
    """The same for every sample of a step."""
    partner: NDArray[np.int64]
    """[b] index, within the rank's samples, of the one that is mixed in."""
    lam: NDArray[np.float32]
    """[b] share of the sample itself; the partner has the rest."""
    boxes: NDArray[np.int64]
    """[b, 4] top, left, height, width of what CutMix takes from the partner; zeros for mixup."""


@dataclass(frozen=True)
class Mixed:
    """A mixed batch; the loss is lam * loss(targets_a) + (1 - lam) * loss(targets_b)."""

    images: Tensor
    """[b, 3, H, W]"""
    targets_a: Tensor
    """[b] int64: the samples' own targets."""
    targets_b: Tensor
    """[b] int64: their partners' targets."""
    lam: Tensor
    """[b] float32 on the device: the share of ``targets_a``."""


def draw_mix(
    seed: int,
    step: int,
    positions: NDArray[np.int64],
    shard_size: int,
    mixup_alpha: float,
    cutmix_alpha: float,
    height: int,
    width: int,
) -> MixDraw | None:
    """Draw partners, shares and boxes for the samples at ``positions`` of the global batch.

    With both alphas positive, each step is mixup or CutMix with equal probability.

    Args:
        seed: the run's seed.
        step: the global step.
        positions: [b] places of the rank's samples in the global batch, covering whole shards in any order.
        shard_size: samples in a virtual shard; a shard of one sample mixes it with itself.
        mixup_alpha: the share is Beta(alpha, alpha); 0 turns mixup off.
        cutmix_alpha: the same for CutMix, where the share is then that of the clipped box.
        height: of the images.
        width: of the images.

    Returns:
        The draw, or None if both alphas are 0.

    Raises:
        ValueError: an alpha is negative, or the positions do not cover whole shards.
    """
    if mixup_alpha < 0 or cutmix_alpha < 0:
        raise ValueError(
            f"mixup alpha is {mixup_alpha} and CutMix alpha {cutmix_alpha}; choose 0 (off) or more"
        )
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return None
    partner = _partners(seed, step, positions, shard_size)
    cutmix_share = 0.5 if mixup_alpha > 0 and cutmix_alpha > 0 else float(cutmix_alpha > 0)
    kind = "cutmix" if rng.uniform(seed, Stream.MIX_KIND, step) < cutmix_share else "mixup"
    alpha = cutmix_alpha if kind == "cutmix" else mixup_alpha
    share = rng.uniform(seed, Stream.MIX_RATIO, step, positions)
    lam = np.asarray(betaincinv(alpha, alpha, share), dtype=np.float64)
    boxes = np.zeros((len(positions), 4), dtype=np.int64)
    if kind == "cutmix":
        boxes = _cutmix_boxes(seed, step, positions, lam, height, width)
        lam = 1.0 - boxes[:, 2] * boxes[:, 3] / (height * width)
    return MixDraw(kind, partner, lam.astype(np.float32), boxes)


def apply_mix(images: Tensor, targets: Tensor, draw: MixDraw) -> Mixed:
    """Mix a batch into new images, in the memory format of ``images`` and without making the host wait.

    Args:
        images: [b, 3, H, W] normalized floats.
        targets: [b] int64.
        draw: from ``draw_mix``, for these b samples.

    Raises:
        ValueError: the draw is for another number of samples.
    """
    if len(draw.partner) != len(images):
        raise ValueError(
            f"{len(draw.partner)} partners were drawn for {len(images)} images; draw one for each"
        )
    partner = host_to_device(torch.from_numpy(draw.partner), images.device)
    lam = host_to_device(torch.from_numpy(draw.lam), images.device)
    partners = _select(images, partner)
    if draw.kind == "cutmix":
        boxes = host_to_device(torch.from_numpy(draw.boxes), images.device)
        mixed = torch.where(box_mask(boxes, images.shape[2], images.shape[3]), partners, images)
    else:
        # Products and sum are rounded one by one: torch.lerp rounds differently where a vector is not full,
        # so its bits would depend on the number of samples that a rank holds.
        weight = lam.view(-1, 1, 1, 1)
        mixed = (images * weight).add_(partners * (1.0 - weight)).to(images.dtype)
    return Mixed(mixed, targets, targets.index_select(0, partner), lam)


def _partners(seed: int, step: int, positions: NDArray[np.int64], shard_size: int) -> NDArray[np.int64]:
    """A random cyclic shift of each shard, never by zero: the sample order is random already."""
    shard, place = np.divmod(positions, shard_size)
    if shard_size > 1:
        shift = 1 + rng.randint(shard_size - 1, seed, Stream.MIX_PARTNER, step, shard)
        place = (place + shift) % shard_size
    wanted = shard * shard_size + place
    order = np.argsort(positions, kind="stable")
    found = np.searchsorted(positions, wanted, sorter=order)
    partner = order[np.minimum(found, len(order) - 1)]
    if not np.array_equal(positions[partner], wanted):
        raise ValueError(
            f"the {len(positions)} positions given do not cover whole shards of {shard_size}; "
            "give each rank whole shards of the global batch"
        )
    return partner


def _cutmix_boxes(
    seed: int, step: int, positions: NDArray[np.int64], lam: NDArray[np.float64], height: int, width: int
) -> NDArray[np.int64]:
    """[b, 4] boxes of area 1 - lam and the image's shape about a uniform center, clipped at the border."""
    half = 0.5 * np.sqrt(1.0 - lam)
    edges: list[NDArray[np.int64]] = []
    for axis, size in enumerate((height, width)):
        center = rng.randint(size, seed, Stream.MIX_BOX, step, positions, axis)
        reach = (half * size).astype(np.int64)
        start = np.maximum(center - reach, 0)
        edges += [start, np.minimum(center + reach, size) - start]
    top, box_height, left, box_width = edges
    return np.stack([top, left, box_height, box_width], axis=-1)


def _select(images: Tensor, index: Tensor) -> Tensor:
    """``images.index_select(0, index)`` that keeps channels_last, over whole rows of memory."""
    if images.is_contiguous(memory_format=torch.channels_last):
        return images.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return images.index_select(0, index)
