"""Random classes of a training step (`method.negatives.random`), for any number of processes and after a resume."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dl2pa.methods import Method, Targets
from pipelines.batch import host_to_device
from pipelines.rng import Stream
from pipelines.sampler import permute


def draw_classes(
    first: int, rows: int, count: int, num_classes: int, seed: int, global_step: int
) -> NDArray[np.int64]:
    """Draw `count` different classes for each of `rows` images from position `first` of the global batch on.

    Image p has the places p · count … (p + 1) · count − 1 of a permutation of the classes, drawn for the step and
    continued periodically. So each class is equally likely, and a batch contains all about equally often.

    Returns:
        int64 [rows, count].
    """
    places = (first + np.arange(rows, dtype=np.int64))[:, None] * count + np.arange(count, dtype=np.int64)
    key = seed, Stream.NEGATIVES, global_step
    if places.size < num_classes:
        return permute(places.ravel() % num_classes, num_classes, *key).reshape(places.shape)
    return permute(np.arange(num_classes, dtype=np.int64), num_classes, *key)[places % num_classes]


def with_negatives(method: Method, targets: Targets, seed: int, global_step: int, first: int = 0) -> Targets:
    """Add the random classes of the images of a process, if the loss of the method uses any.

    Args:
        first: position of the first image in the global batch.
    """
    count = method.options.random_negatives
    if not count:
        return targets
    drawn = draw_classes(first, len(targets.first), count, method.num_classes, seed, global_step)
    return targets._replace(negatives=host_to_device(torch.from_numpy(drawn), targets.first.device))
