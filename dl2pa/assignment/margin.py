"""Margin between the best and the second best assignment.

Two assignments differ by cycles of labels that exchange their prototypes. So the second best assignment differs from
the optimum by the shortest directed cycle in the graph over labels in which edge i → j has the cost
c[i, σ(j)] − c[i, σ(i)] of giving label i the prototype of label j (Murty, Operations Research 1968, ranks assignments
by such changes). The dual potentials of the optimum make all edges non-negative, and the cycle is found exactly: the
best swap of two labels is a first bound, edges that no shorter cycle can contain are removed, and Dijkstra's algorithm
searches the few remaining edges.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dl2pa.assignment.bipartite import Floats

MAX_CLASSES = 2000
"""Above this number the margin is not computed: it needs several C×C arrays and at least the time of the solve."""

_ROUNDING = 1e-12
_MAX_EDGES_PER_LABEL = 64
"""Maximum mean number of remaining edges per label; with more, the search takes longer than the solve."""


def second_best_margin(cost_cc: Floats, assignment_c: NDArray[np.int64]) -> float | None:
    """Cost of the second best assignment minus that of the best, ≥ 0; None if it is too expensive to compute.

    Args:
        cost_cc: [C, C]; a constant added to a row or column does not matter.
        assignment_c: an optimal σ, int64 [C].
    """
    count = len(cost_cc)
    if not 2 <= count <= MAX_CLASSES:
        return None
    edges = np.take(cost_cc, assignment_c, axis=1)
    edges -= edges.diagonal()[:, None].copy()
    np.fill_diagonal(edges, np.inf)
    potentials = _potentials(edges)
    if potentials is None:
        return None
    edges += potentials[:, None]
    edges -= potentials
    np.maximum(edges, 0.0, out=edges)
    best = float((edges + edges.T).min())
    return _shortest_cycle(edges, best)


def _potentials(edges_cc: Floats) -> Floats | None:
    """π with edge(i, j) + π_i − π_j ≥ 0 by Bellman-Ford relaxation; None if rounding errors prevent convergence."""
    potentials = np.minimum(edges_cc.min(axis=0), 0.0)
    changed = np.flatnonzero(potentials < 0.0)
    for _ in range(len(edges_cc)):
        if not len(changed):
            return potentials
        candidates = (edges_cc[changed] + potentials[changed, None]).min(axis=0)
        better = candidates < potentials - _ROUNDING
        potentials[better] = candidates[better]
        changed = np.flatnonzero(better)
    return None


def _shortest_cycle(edges_cc: Floats, best: float) -> float | None:
    """Length of the shortest cycle of non-negative edges, given the length of the shortest cycle of two edges."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import dijkstra

    # A longer cycle through (i, j) has a further edge into i and a further edge out of j.
    bound = best - edges_cc.min(axis=0)[:, None] - edges_cc.min(axis=1)
    start, stop = np.nonzero(edges_cc < bound)
    length = edges_cc[start, stop]
    kept = -1
    while 0 < len(length) != kept:
        kept = len(length)
        into, out = np.full(len(edges_cc), np.inf), np.full(len(edges_cc), np.inf)
        np.minimum.at(into, stop, length)
        np.minimum.at(out, start, length)
        usable = length + into[start] + out[stop] < best
        start, stop, length = start[usable], stop[usable], length[usable]
    if not len(length):
        return best
    if len(length) > _MAX_EDGES_PER_LABEL * len(edges_cc):
        return None
    nodes, place = np.unique(np.concatenate([start, stop]), return_inverse=True)
    first, last = place[: len(start)], place[len(start) :]
    graph = csr_array((length, (first, last)), shape=(len(nodes), len(nodes)))
    back = dijkstra(graph, limit=best)[last, first]
    return min(best, float((back + length).min()))
