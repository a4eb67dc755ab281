"""Random erasing (Zhong et al., AAAI 2020) of one rectangle per sample, with torchvision's rule and defaults."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import rng
from pipelines.batch import host_to_device
from pipelines.rng import Stream

AREA_RANGE = (0.02, 0.33)
"""Range of the erased fraction of the image, before rounding to whole pixels."""
ASPECT_RANGE = (0.3, 3.3)
"""Range of height / width, log-uniform."""
NUM_TRIES = 10

_GATE = NUM_TRIES
"""Last key word of the draw that decides whether a sample is erased; smaller words are its tries."""


def draw_erasing(
    seed: int, epoch: int, indices: NDArray[np.int64], height: int, width: int, probability: float
) -> NDArray[np.int64]:
    """Draw one rectangle per sample of ``indices`` [B], keyed by (seed, epoch, sample).

    A rectangle that does not fit into the image is drawn again; after ten tries the sample is not erased.

    Returns:
        [B, 4] int64: top, left, height, width; zeros for a sample that is not erased.

    Raises:
        ValueError: ``probability`` is not between 0 and 1.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"the erasing probability is {probability}; choose one between 0 and 1")
    boxes = np.zeros((len(indices), 4), dtype=np.int64)
    chosen = np.flatnonzero(rng.uniform(seed, Stream.ERASE, epoch, indices, _GATE) < probability)
    key = (
        seed,
        Stream.ERASE,
        epoch,
        indices[chosen, None, None],
        np.arange(NUM_TRIES)[:, None],
        np.arange(4),
    )
    area, aspect, down, across = np.moveaxis(rng.uniform(*key), -1, 0)
    area = _between(area, *AREA_RANGE) * (height * width)
    aspect = np.exp(_between(aspect, math.log(ASPECT_RANGE[0]), math.log(ASPECT_RANGE[1])))
    box_height = np.rint(np.sqrt(area * aspect))
    box_width = np.rint(np.sqrt(area / aspect))
    top = np.floor(down * (height - box_height + 1))
    left = np.floor(across * (width - box_width + 1))
    tries = np.stack([top, left, box_height, box_width], axis=-1).astype(np.int64)
    fits = (box_height < height) & (box_width < width)
    first = fits.argmax(axis=1)
    rows = np.arange(len(chosen))
    boxes[chosen] = np.where(fits[rows, first, None], tries[rows, first], 0)
    return boxes


def apply_erasing(images: Tensor, boxes: NDArray[np.int64]) -> Tensor:
    """Set the rectangles to 0, the mean color after normalization, in place.

    Args:
        images: [B, 3, H, W] normalized floats on any device.
        boxes: [B, 4] from ``draw_erasing``.

    Returns:
        ``images``.

    Raises:
        ValueError: the number of boxes is not the number of images.
    """
    if boxes.shape != (len(images), 4):
        raise ValueError(f"the boxes are {boxes.shape}; {len(images)} images need {(len(images), 4)}")
    if images.device.type == "cpu":
        pixels = images.numpy()  # a view: a slice of an array costs less than one of a tensor
        for image in np.flatnonzero(boxes[:, 2:].all(axis=1)).tolist():
            top, left, height, width = boxes[image].tolist()
            pixels[image, :, top : top + height, left : left + width] = 0.0
        return images
    if not boxes.any():
        return images
    mask = box_mask(host_to_device(torch.from_numpy(boxes), images.device), images.shape[2], images.shape[3])
    return images.masked_fill_(mask, 0.0)


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """[B, 1, H, W] bool, true inside the boxes [B, 4] (top, left, height, width)."""
    start, size = boxes.view(-1, 2, 2, 1).unbind(1)
    position = torch.arange(max(height, width), device=boxes.device)
    rows, columns = ((position >= start) & (position < start + size)).unbind(1)
    return (rows[:, :height].unsqueeze(2) & columns[:, :width].unsqueeze(1)).unsqueeze(1)


def _between(unit: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + unit * (high - low)
