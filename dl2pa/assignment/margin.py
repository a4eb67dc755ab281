"""How much better the best assignment is than the second best.

Two assignments differ by cycles of labels that hand their prototypes round, so the cheapest change of the optimum is
the shortest directed cycle of the graph over labels whose edge i → j costs what label i pays for taking j's prototype,
c[i, σ(j)] − c[i, σ(i)] (Murty, Operations Research 1968, ranks assignments by such changes). With the dual potentials
of the optimum all edges are non-negative and the cycle is found exactly: a swap of two labels gives a first bound,
edges that no cycle below it can use are dropped, and the few that are left are searched by Dijkstra's algorithm.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dl2pa.assignment.bipartite import Floats

MOST_CLASSES = 2000
"""Beyond, nothing is computed: O(C²) memory several times over, and time like the solve's or more."""

_ROUNDING = 1e-12
_MOST_EDGES_EACH = 64
"""Edges a label left for the search; with more on average it would take longer than the solve."""


def second_best_margin(cost_cc: Floats, assignment_c: NDArray[np.int64]) -> float | None:
    """Cost of the second best assignment less that of the best, ≥ 0; None where that is too dear to find out.

    Args:
        cost_cc: [C, C], in any centring.
        assignment_c: an optimal σ, int64 [C].
    """
    count = len(cost_cc)
    if not 2 <= count <= MOST_CLASSES:
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
    """π with edge(i, j) + π_i − π_j ≥ 0, by Bellman and Ford's relaxation; None if rounding keeps it from settling."""
    potentials = np.minimum(edges_cc.min(axis=0), 0.0)
    changed = np.flatnonzero(potentials < 0.0)
    for _ in range(len(edges_cc)):
        if not len(changed):
            return potentials
        reached = (edges_cc[changed] + potentials[changed, None]).min(axis=0)
        better = reached < potentials - _ROUNDING
        potentials[better] = reached[better]
        changed = np.flatnonzero(better)
    return None


def _shortest_cycle(edges_cc: Floats, best: float) -> float | None:
    """Length of the shortest cycle given non-negative edges and the length of the shortest of two edges."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import dijkstra

    # A longer cycle through (i, j) enters i and leaves j by two further edges.
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
    if len(length) > _MOST_EDGES_EACH * len(edges_cc):
        return None
    nodes, place = np.unique(np.concatenate([start, stop]), return_inverse=True)
    first, last = place[: len(start)], place[len(start) :]
    graph = csr_array((length, (first, last)), shape=(len(nodes), len(nodes)))
    back = dijkstra(graph, limit=best)[last, first]
    return min(best, float((back + length).min()))
