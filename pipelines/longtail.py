"""Long-tailed training splits, and the head, medium and tail groups of classes.

Class k of C keeps int(n_max · imbalance^(k/(C-1))) images with n_max = N/C, classes in index order (Cao et al.,
NeurIPS 2019; used by Yang et al., NeurIPS 2022, and DL2PA). The images are drawn class by class with NumPy's legacy
generator and seed 0. On CIFAR and STL-10 they are exactly the images of the published tables, for every
``train.seed``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError

log = logging.getLogger(__name__)

Group = Literal["head", "medium", "tail"]
GROUPS: tuple[Group, ...] = ("head", "medium", "tail")

_SPLIT_SEED = 0
# First class index of medium and of tail in the published tables, by number of classes.
_STARTS = {10: (3, 7), 100: (36, 71)}
# Head classes have more than _MANY training images, tail classes fewer than _FEW (Liu et al., CVPR 2019).
_MANY, _FEW = 100, 20
_NATURAL_IMBALANCE = 0.1


def long_tail(labels: NDArray[np.int64], classes: Sequence[str], imbalance: float) -> NDArray[np.int64]:
    """Sample numbers [M] of the long-tailed split, class by class.

    A class with fewer images than its share keeps all of them, and a warning is logged.

    Args:
        labels: [N] of the full training split, indices into ``classes``.
        classes: the class names in label order.
        imbalance: images of the last class / images of the first class, in (0, 1).

    Raises:
        UserError: a class would keep no image (``data.imbalance``).
    """
    shares = _shares(len(labels), classes, imbalance)
    kept = _draw(labels, shares)
    short = [k for k, (samples, share) in enumerate(zip(kept, shares, strict=True)) if len(samples) < share]
    if short:
        k = short[0]
        log.warning(
            "data.imbalance = %s: %d class(es) have fewer images than their share and keep all of them, the first "
            "is %r: %d of %d",
            *(imbalance, len(short), classes[k], len(kept[k]), shares[k]),
        )
    return np.concatenate(kept)


def long_tail_legacy(
    labels: NDArray[np.int64], classes: Sequence[str], imbalance: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Samples [M] of the authors' split, and the labels [M] that their code assigns.

    Their code repeats each class's label by the class's share, even if the class has fewer images: after such a
    class, labels and images are shifted against each other.

    Raises:
        UserError: a class would keep no image (``data.imbalance``).
    """
    shares = _shares(len(labels), classes, imbalance)
    samples = np.concatenate(_draw(labels, shares))
    repeated = np.repeat(np.arange(len(classes), dtype=np.int64), shares)
    return samples, repeated[: len(samples)]


def class_groups(counts: NDArray[np.int64], imbalance: float | None) -> tuple[Group, ...] | None:
    """The group of each class, or None if the training split is not long-tailed.

    With ``data.imbalance`` and 10 or 100 classes, the groups are the published class ranges: 0-3, 3-7, 7-10, or
    0-36, 36-71, 71-100. Otherwise they depend on the number of training images: head more than 100, tail fewer
    than 20. Without ``data.imbalance``, a split is long-tailed if its rarest class has at most a tenth of the
    images of its most frequent class; classes without images are ignored there and belong to the tail.

    Args:
        counts: [C] training images of each class.
        imbalance: ``data.imbalance``.
    """
    starts = _STARTS.get(len(counts))
    if imbalance is not None and starts is not None:
        return tuple(GROUPS[(k >= starts[0]) + (k >= starts[1])] for k in range(len(counts)))
    present = counts[counts > 0]
    if imbalance is None and (not len(present) or present.min() > _NATURAL_IMBALANCE * present.max()):
        return None
    return tuple("head" if n > _MANY else "tail" if n < _FEW else "medium" for n in counts.tolist())


def _shares(num_samples: int, classes: Sequence[str], imbalance: float) -> list[int]:
    """Number of images that each class should keep."""
    most = num_samples / len(classes)
    last = max(len(classes) - 1, 1)
    # The authors' order of operations: rounding decides if a share is an integer.
    shares = [int(most * imbalance ** (k / last)) for k in range(len(classes))]
    if min(shares) < 1:
        lowest = math.ceil(1e4 / most) / 1e4
        remedy = f"Choose at least {lowest}." if lowest < 1 else "Leave data.imbalance out."
        message = f"the class {classes[shares.index(0)]!r} would keep no training image"
        raise UserError("data.imbalance", imbalance, message, remedy)
    return shares


def _draw(labels: NDArray[np.int64], shares: Sequence[int]) -> list[NDArray[np.int64]]:
    """Samples that each class keeps, at most its share."""
    generator = np.random.RandomState(_SPLIT_SEED)
    kept: list[NDArray[np.int64]] = []
    for k, share in enumerate(shares):
        samples = np.flatnonzero(labels == k)
        generator.shuffle(samples)
        kept.append(samples[:share])
    return kept
