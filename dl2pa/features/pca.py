"""Principal components of the training features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Pca:
    """Projection x ↦ V (x − μ) on the directions of largest variance, without whitening.

    Attributes:
        mean: μ [D], float64.
        components: V [k, D], float64, orthonormal rows; the largest entry of each is positive.
        variances: [k], largest first.
        explained: share of the total variance.
    """

    mean: NDArray[np.float64]
    components: NDArray[np.float64]
    variances: NDArray[np.float64]
    explained: float

    def project(self, features_nd: NDArray[Any]) -> NDArray[np.float64]:
        """Project features [N, D] to [N, k]."""
        return (features_nd.astype(np.float64) - self.mean) @ self.components.T


def fit_pca(blocks: Iterable[NDArray[Any]], count: int) -> Pca:
    """Compute `count` principal components of features given in blocks [n, D], in float64."""
    total, number = np.zeros(0), 0
    products = np.zeros((0, 0))
    for block in blocks:
        x = block.astype(np.float64)
        if number == 0:
            total, products = np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1]))
        total += x.sum(axis=0)
        products += x.T @ x
        number += len(x)
    mean = total / number
    variances, vectors = np.linalg.eigh(products / number - np.outer(mean, mean))
    components = vectors[:, ::-1][:, :count].T
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    kept = variances[::-1][:count]
    explained = float(kept.sum() / max(float(variances.sum()), np.finfo(float).tiny))
    return Pca(mean, components * np.sign(largest), kept, explained)
