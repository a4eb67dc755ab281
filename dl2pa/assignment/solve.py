"""The exact assignment of labels to prototypes, and the program that finds it in a process of its own.

As a program (`python solve.py PARENT INPUT OUTPUT C d`, the middle two being open file descriptors) it loads NumPy and
SciPy alone, so this module imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_PR_SET_PDEATHSIG = 1
_NICENESS = 10
"""A tenth of a core where none is to spare: training keeps its speed and the solve still gets on."""


def solve_assignment(rows_cd: Floats, prototypes_cd: Floats) -> NDArray[np.int64]:
    """The permutation σ that maximises Σ_c q_c · P[σ(c)] (a linear assignment, solved exactly).

    A function of its arguments alone: the same bits from any number of threads. Needs 8 C² bytes for the cost.

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
    a direction, as in an untrained network. Centring Q and P does it without a second pass over the cost, which BLAS
    builds block by block in the array returned: the only one of C × C.
    """
    from threadpoolctl import threadpool_limits

    rows = rows_cd.mean(axis=0) - rows_cd
    points = prototypes_cd - prototypes_cd.mean(axis=0)
    # One thread: how BLAS splits the work may change a last bit, and a last bit an assignment.
    with threadpool_limits(1, user_api="blas"):
        return rows @ points.T


def solve_cost(cost_cc: Floats) -> NDArray[np.int64]:
    """The permutation of least cost, int64 [C]."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(cost_cc)
    return np.asarray(columns, dtype=np.int64)


def _main(parent: int, source: int, target: int, count: int, dim: int) -> None:
    """Read Q and P (float64, one after the other) from one descriptor, write σ to the other."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("its parent is gone")
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(
            number, signal.SIG_IGN
        )  # whoever stops the run kills this process when the state is saved
    os.nice(_NICENESS)
    given = np.frombuffer(mmap.mmap(source, 0, prot=mmap.PROT_READ)).reshape(2, count, dim)
    sigma = solve_assignment(given[0], given[1])
    with os.fdopen(target, "wb") as out:
        out.write(sigma.tobytes())


if __name__ == "__main__":
    _main(*(int(text) for text in sys.argv[1:]))
