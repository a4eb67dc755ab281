"""The exact assignment of labels to prototypes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def solve_assignment(rows_cd: NDArray[np.float64], prototypes_cd: NDArray[np.float64]) -> NDArray[np.int64]:
    """The permutation σ that maximises Σ_c q_c · P[σ(c)] (a linear assignment, solved exactly).

    The square cost is centred first: subtracting the means of columns and rows changes every permutation's cost
    by the same amount, so not the optimum, and it is what keeps SciPy's augmenting paths short where all classes
    share a direction, as in an untrained network.

    Args:
        rows_cd: statistic [C, d].
        prototypes_cd: P [C, d].

    Returns:
        σ, int64 [C]: label c stands at prototype σ[c].
    """
    from scipy.optimize import linear_sum_assignment

    cost = -(rows_cd @ prototypes_cd.T)
    cost -= cost.mean(axis=0, keepdims=True)
    cost -= cost.mean(axis=1, keepdims=True)
    _, columns = linear_sum_assignment(cost)
    return np.asarray(columns, dtype=np.int64)
