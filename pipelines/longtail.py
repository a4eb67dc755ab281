"""Long-tailed splits: which training images are kept, and which classes are head, medium and tail.

Class k of C keeps int(n_max · imbalance^(k/(C-1))) images with n_max = N/C, classes in index order (Cao et al.,
NeurIPS 2019, as Yang et al., NeurIPS 2022, and DL2PA use it). Which ones is drawn with NumPy's frozen legacy
generator seeded by 0, class after class: on CIFAR and STL-10 these are the very images of the published tables,
whatever ``train.seed`` is.
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
# Where medium and tail begin, by class index, in the published tables' two sizes.
_STARTS = {10: (3, 7), 100: (36, 71)}
# Training images: head has more than the first, tail fewer than the second (Liu et al., CVPR 2019).
_MANY, _FEW = 100, 20
_NATURAL_IMBALANCE = 0.1


def long_tail(labels: NDArray[np.int64], classes: Sequence[str], imbalance: float) -> NDArray[np.int64]:
    """The samples [M] of the long-tailed split, class after class.

    A class with fewer images than its share keeps all of them; that is said in the log.

    Args:
        labels: [N] of the whole training split, indices into ``classes``.
        classes: the class names in label order.
        imbalance: images of the last class over those of the first, in (0, 1).

    Raises:
        UserError: a class would keep no image (``data.imbalance``).
    """
    shares = _shares(len(labels), classes, imbalance)
    kept = _draw(labels, shares)
    short = [k for k, (samples, share) in enumerate(zip(kept, shares, strict=True)) if len(samples) < share]
    if short:
        k = short[0]
        log.warning(
            "data.imbalance = %s: %d class(es) have fewer images than their share and keep all, the first %r: "
            "%d of %d",
            *(imbalance, len(short), classes[k], len(kept[k]), shares[k]),
        )
    return np.concatenate(kept)


def long_tail_legacy(
    labels: NDArray[np.int64], classes: Sequence[str], imbalance: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The authors' split: samples [M], and the labels [M] their code gives them.

    It writes each class's label as often as the class's share, whether or not the class has that many images:
    after a class that is short, every label stands before its image.

    Raises:
        UserError: a class would keep no image (``data.imbalance``).
    """
    shares = _shares(len(labels), classes, imbalance)
    samples = np.concatenate(_draw(labels, shares))
    written = np.repeat(np.arange(len(classes), dtype=np.int64), shares)
    return samples, written[: len(samples)]


def class_groups(counts: NDArray[np.int64], imbalance: float | None) -> tuple[Group, ...] | None:
    """The group of each class, or None where the training split has no long tail.

    A split made here with 10 or 100 classes has the published groups, by class index: 0-3, 3-7, 7-10, or 0-36,
    36-71, 71-100. For any other the training images decide: head more than 100, tail fewer than 20. A split as
    it lies on disk counts as long-tailed where the rarest class has at most a tenth of the commonest's images;
    classes without any are left out of that comparison, and belong to the tail.

    Args:
        counts: [C] training images of each class.
        imbalance: ``data.imbalance``; None where the split is as it lies on disk.
    """
    starts = _STARTS.get(len(counts))
    if imbalance is not None and starts is not None:
        return tuple(GROUPS[(k >= starts[0]) + (k >= starts[1])] for k in range(len(counts)))
    present = counts[counts > 0]
    if imbalance is None and (not len(present) or present.min() > _NATURAL_IMBALANCE * present.max()):
        return None
    return tuple("head" if n > _MANY else "tail" if n < _FEW else "medium" for n in counts.tolist())


def _shares(num_samples: int, classes: Sequence[str], imbalance: float) -> list[int]:
    """Images that each class should keep."""
    most = num_samples / len(classes)
    last = max(len(classes) - 1, 1)
    # Their order of operations: where a share is a whole number, the last bit decides.
    shares = [int(most * imbalance ** (k / last)) for k in range(len(classes))]
    if min(shares) < 1:
        lowest = math.ceil(1e4 / most) / 1e4
        remedy = f"Choose at least {lowest}." if lowest < 1 else "Leave data.imbalance out."
        message = f"leaves the class {classes[shares.index(0)]!r} no training image"
        raise UserError("data.imbalance", imbalance, message, remedy)
    return shares


def _draw(labels: NDArray[np.int64], shares: Sequence[int]) -> list[NDArray[np.int64]]:
    """The samples that each class keeps: at most its share."""
    generator = np.random.RandomState(_SPLIT_SEED)
    kept: list[NDArray[np.int64]] = []
    for k, share in enumerate(shares):
        samples = np.flatnonzero(labels == k)
        generator.shuffle(samples)
        kept.append(samples[:share])
    return kept
