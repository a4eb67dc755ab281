"""mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019) on the device, after the pipeline.

Parameters are drawn on the host from (seed, step, position in the global batch), and the partner of a sample is in
the same virtual shard. The mixed global batch is therefore bit-identical for every number of processes.
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
class MixParams:
    """Mixing parameters of the b samples of a rank, on the host."""

    kind: Literal["mixup", "cutmix"]
    """The same for every sample of a step."""
    partner: NDArray[np.int64]
    """[b] index of the partner among the rank's samples."""
    lam: NDArray[np.float32]
    """[b] weight of the sample; the partner has weight 1 - lam."""
    boxes: NDArray[np.int64]
    """[b, 4] top, left, height, width of the box that CutMix copies from the partner; zeros for mixup."""


@dataclass(frozen=True)
class Mixed:
    """A mixed batch; the loss is lam * loss(targets_a) + (1 - lam) * loss(targets_b)."""

    images: Tensor
    """[b, 3, H, W]"""
    targets_a: Tensor
    """[b] int64: targets of the samples."""
    targets_b: Tensor
    """[b] int64: targets of the partners."""
    lam: Tensor
    """[b] float32 on the device: weight of ``targets_a``."""


def draw_mix(
    seed: int,
    step: int,
    positions: NDArray[np.int64],
    shard_size: int,
    mixup_alpha: float,
    cutmix_alpha: float,
    height: int,
    width: int,
) -> MixParams | None:
    """Draw partners, weights and boxes for the samples at ``positions`` of the global batch.

    With both alphas positive, each step is mixup or CutMix with equal probability.

    Args:
        seed: the run's seed.
        step: the global step.
        positions: [b] positions of the rank's samples in the global batch: complete shards, in any order.
        shard_size: samples per virtual shard; in a shard of one, a sample is its own partner.
        mixup_alpha: the weight is Beta(alpha, alpha); 0 turns mixup off.
        cutmix_alpha: the same for CutMix, where the weight is then recomputed from the clipped box.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        The parameters, or None if both alphas are 0.

    Raises:
        ValueError: an alpha is negative, or the positions do not form complete shards.
    """
    if mixup_alpha < 0 or cutmix_alpha < 0:
        raise ValueError(
            f"mixup alpha is {mixup_alpha} and CutMix alpha is {cutmix_alpha}; both must be at least 0 (off)"
        )
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return None
    partner = _partners(seed, step, positions, shard_size)
    cutmix_probability = 0.5 if mixup_alpha > 0 and cutmix_alpha > 0 else float(cutmix_alpha > 0)
    kind = "cutmix" if rng.uniform(seed, Stream.MIX_KIND, step) < cutmix_probability else "mixup"
    alpha = cutmix_alpha if kind == "cutmix" else mixup_alpha
    quantile = rng.uniform(seed, Stream.MIX_RATIO, step, positions)
    lam = np.asarray(betaincinv(alpha, alpha, quantile), dtype=np.float64)
    boxes = np.zeros((len(positions), 4), dtype=np.int64)
    if kind == "cutmix":
        boxes = _cutmix_boxes(seed, step, positions, lam, height, width)
        lam = 1.0 - boxes[:, 2] * boxes[:, 3] / (height * width)
    return MixParams(kind, partner, lam.astype(np.float32), boxes)


def apply_mix(images: Tensor, targets: Tensor, params: MixParams) -> Mixed:
    """Mix a batch into new images, in the memory format of ``images``, without synchronizing.

    Args:
        images: [b, 3, H, W] normalized floats; for mixup also feature vectors [b, D].
        targets: [b] int64.
        params: from ``draw_mix``, for these b samples.

    Raises:
        ValueError: the parameters are for another number of samples.
    """
    if len(params.partner) != len(images):
        raise ValueError(
            f"{len(params.partner)} partners were drawn for {len(images)} images; draw one for each"
        )
    partner = host_to_device(torch.from_numpy(params.partner), images.device)
    lam = host_to_device(torch.from_numpy(params.lam), images.device)
    partners = _select(images, partner)
    if params.kind == "cutmix":
        boxes = host_to_device(torch.from_numpy(params.boxes), images.device)
        mixed = torch.where(box_mask(boxes, images.shape[2], images.shape[3]), partners, images)
    else:
        # Products and sum are rounded separately: torch.lerp rounds differently in incomplete SIMD vectors, so its
        # result would depend on the number of samples per rank.
        weight = lam.view(-1, *[1] * (images.ndim - 1))
        mixed = (images * weight).add_(partners * (1.0 - weight)).to(images.dtype)
    return Mixed(mixed, targets, targets.index_select(0, partner), lam)


def _partners(seed: int, step: int, positions: NDArray[np.int64], shard_size: int) -> NDArray[np.int64]:
    """Cyclic shift of each shard by a random nonzero amount; the sample order is already random."""
    shard, offset = np.divmod(positions, shard_size)
    if shard_size > 1:
        shift = 1 + rng.randint(shard_size - 1, seed, Stream.MIX_PARTNER, step, shard)
        offset = (offset + shift) % shard_size
    targets = shard * shard_size + offset
    order = np.argsort(positions, kind="stable")
    ranks = np.searchsorted(positions, targets, sorter=order)
    partner = order[np.minimum(ranks, len(order) - 1)]
    if not np.array_equal(positions[partner], targets):
        raise ValueError(
            f"the {len(positions)} positions do not form complete shards of {shard_size}; "
            "give each rank complete shards of the global batch"
        )
    return partner


def _cutmix_boxes(
    seed: int, step: int, positions: NDArray[np.int64], lam: NDArray[np.float64], height: int, width: int
) -> NDArray[np.int64]:
    """[b, 4] boxes of relative area 1 - lam, the image's aspect ratio and a uniform center, clipped at the border."""
    half_side = 0.5 * np.sqrt(1.0 - lam)
    edges: list[NDArray[np.int64]] = []
    for axis, size in enumerate((height, width)):
        center = rng.randint(size, seed, Stream.MIX_BOX, step, positions, axis)
        reach = (half_side * size).astype(np.int64)
        start = np.maximum(center - reach, 0)
        edges += [start, np.minimum(center + reach, size) - start]
    top, box_height, left, box_width = edges
    return np.stack([top, left, box_height, box_width], axis=-1)


def _select(images: Tensor, index: Tensor) -> Tensor:
    """``images.index_select(0, index)`` that keeps channels_last."""
    if images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last):
        return images.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return images.index_select(0, index)
