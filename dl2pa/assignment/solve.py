"""The exact assignment of labels to prototypes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def solve_assignment(rows_cd: Floats, prototypes_cd: Floats) -> NDArray[np.int64]:
    """The permutation σ that maximises Σ_c q_c · P[σ(c)] (a linear assignment, solved exactly).

    Args:
        rows_cd: statistic [C, d].
        prototypes_cd: P [C, d].

    Returns:
        σ, int64 [C]: label c stands at prototype σ[c].
    """
    return solve_cost(centred_cost(rows_cd, prototypes_cd))


def centred_cost(rows_cd: Floats, prototypes_cd: Floats) -> Floats:
    """The cost −Q Pᵀ [C, C], less the means of its columns and rows.

    On a square cost this changes every permutation's cost by the same amount, so neither the optimum nor any
    difference between two permutations, and it is what keeps SciPy's augmenting paths short where all classes share
    a direction, as in an untrained network.
    """
    cost = -(rows_cd @ prototypes_cd.T)
    cost -= cost.mean(axis=0, keepdims=True)
    cost -= cost.mean(axis=1, keepdims=True)
    return cost


def solve_cost(cost_cc: Floats) -> NDArray[np.int64]:
    """The permutation of least cost, int64 [C]."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(cost_cc)
    return np.asarray(columns, dtype=np.int64)
