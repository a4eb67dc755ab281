"""Minimum-weight matchings of a sparse bipartite graph with integer weights, and their dual potentials."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_BID_ROUNDS = 300
_INCREMENT = 0.01
"""Minimum increment of a bid, in standard deviations of the weights."""


@dataclass(frozen=True)
class Graph:
    """Edges between rows 0…n−1 and columns 0…C−1, n ≤ C, sorted by (row, column) without duplicates.

    Attributes:
        shape: (n, C).
        rows, columns: int64 [E].
    """

    shape: tuple[int, int]
    rows: Integers
    columns: Integers

    @classmethod
    def of(cls, shape: tuple[int, int], rows: Integers, columns: Integers) -> Graph:
        """Sort the edges and remove duplicates."""
        keys = np.sort(rows * shape[1] + columns, kind="stable")
        first = np.concatenate([[True], keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, dtype=bool)
        return cls(shape, *np.divmod(keys[first], shape[1]))

    @classmethod
    def complete(cls, shape: tuple[int, int]) -> Graph:
        """Build the graph of all pairs."""
        return cls(shape, *np.divmod(np.arange(shape[0] * shape[1]), shape[1]))

    @property
    def edges(self) -> tuple[Integers, Integers]:
        """Rows and columns."""
        return self.rows, self.columns

    @property
    def row_starts(self) -> Integers:
        """Position of the first edge of each row, and the number of edges, int64 [n + 1]."""
        return np.searchsorted(self.rows, np.arange(self.shape[0] + 1))

    def subgraph(self, edges: NDArray[np.bool_]) -> Graph:
        """Keep the selected edges only."""
        return Graph(self.shape, self.rows[edges], self.columns[edges])

    def positions(self, rows: Integers, columns: Integers) -> Integers:
        """Positions of the given edges in the graph; −1 if the graph does not contain the edge."""
        keys, queries = self.rows * self.shape[1] + self.columns, rows * self.shape[1] + columns
        positions = np.searchsorted(keys, queries).clip(max=max(len(keys) - 1, 0))
        return np.where(keys[positions] == queries, positions, -1) if len(keys) else np.full(len(queries), -1)


@dataclass(frozen=True)
class MinWeightMatching:
    """Minimum-weight matching that covers every row, with the dual potentials that prove it.

    The weight of every edge is at least row_i + column_j, with equality for matched edges. If n < C, no column
    potential is positive and those of unmatched columns are 0. So the weight of any matching is at least
    Σ row_i + Σ column_j, the weight of this one.

    Attributes:
        columns: column of each row, int64 [n].
        row_potentials, column_potentials: float64 [n] and [C].
    """

    columns: Integers
    row_potentials: Floats
    column_potentials: Floats

    @property
    def weight(self) -> float:
        """Total weight."""
        return float(self.row_potentials.sum() + self.column_potentials.sum())

    def slack(self, graph: Graph, weights: Floats) -> Floats:
        """Weights minus the potentials of both ends; 0 for every edge of a minimum-weight matching."""
        return weights - self.row_potentials[graph.rows] - self.column_potentials[graph.columns]

    def optimal_edges(self, graph: Graph, weights: Floats) -> NDArray[np.bool_]:
        """Edges that belong to any minimum-weight matching; there are n of them if it is unique.

        Two such matchings differ by cycles of edges with slack 0, so an edge belongs to one of them if both its ends
        are in the same strong component of the residual graph. There, the unmatched columns are one node, with an
        edge to every row whose column has potential 0.
        """
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import connected_components

        count = graph.shape[0]
        owner = np.full(graph.shape[1], count)
        owner[self.columns] = np.arange(count)
        tight = np.flatnonzero(self.slack(graph, weights) == 0.0)
        released = np.flatnonzero(self.column_potentials[self.columns] == 0.0)
        sources = np.concatenate([graph.rows[tight], np.full(len(released), count)])
        targets = np.concatenate([owner[graph.columns[tight]], released])
        residual = csr_array((np.ones(len(sources)), (sources, targets)), shape=(count + 1, count + 1))
        _, component = connected_components(residual, connection="strong")
        optimal = np.zeros(len(graph.rows), dtype=bool)
        optimal[tight] = component[graph.rows[tight]] == component[owner[graph.columns[tight]]]
        return optimal


def match_rows(
    graph: Graph, weights: Floats, known: Integers, start: MinWeightMatching | None = None
) -> MinWeightMatching:
    """Find a minimum-weight matching that covers every row.

    Weights are integers and sums of a few of them are below 2^53, so the arithmetic is exact.

    Args:
        known: columns of any matching of all rows in the graph, int64 [n].
        start: result for similar edges and weights; it only saves time.
    """
    if graph.shape[0] != graph.shape[1]:
        return _match_reduced(graph, weights, known)
    start = start or _auction(graph, weights, known)
    # After subtraction of the previous potentials nearly all matched edges have weight 0, the minimum.
    change = _match_reduced(graph, start.slack(graph, weights), known)
    rows = start.row_potentials + change.row_potentials
    return MinWeightMatching(change.columns, rows, start.column_potentials + change.column_potentials)


def _match_reduced(graph: Graph, weights: Floats, known: Integers) -> MinWeightMatching:
    columns = _cheapest_edges(graph, weights)
    if columns is None:
        columns = _solve_sparse(graph, weights, known)
    matched = weights[graph.positions(np.arange(graph.shape[0]), columns)]
    potentials = _shortest_distances(graph, weights - matched[graph.rows], columns)
    return MinWeightMatching(columns, matched - potentials[columns], potentials)


def _auction(graph: Graph, weights: Floats, known: Integers) -> MinWeightMatching:
    """Potentials near the optimum by an auction (Bertsekas, Annals of Operations Research 14).

    The auction stops after a fixed number of rounds, when a few rows may have no column; the returned columns are
    `known`.
    """
    count = graph.shape[0]
    first = graph.row_starts
    prices, owners, waiting = np.zeros(graph.shape[1]), np.full(graph.shape[1], -1), np.arange(count)
    increment = max(1.0, np.rint(_INCREMENT * float(weights.std())))
    for _ in range(_BID_ROUNDS):
        if not len(waiting):
            break
        edges, starts, sizes = _edges_of(first, waiting)
        costs = weights[edges] + prices[graph.columns[edges]]
        best = np.minimum.reduceat(costs, starts)
        cheapest = np.flatnonzero(costs == np.repeat(best, sizes))
        _, chosen = np.unique(np.searchsorted(starts, cheapest, side="right"), return_index=True)
        columns = graph.columns[edges[cheapest[chosen]]]
        costs[cheapest[chosen]] = np.inf
        second = np.minimum.reduceat(costs, starts)
        bids = prices[columns] + np.where(np.isfinite(second), second - best, 0.0) + increment
        order = np.argsort(bids, kind="stable")
        highest = np.full(graph.shape[1], -1)
        highest[columns[order]] = order
        sold = np.flatnonzero(highest >= 0)
        winners = highest[sold]
        outbid = owners[sold]
        prices[sold], owners[sold] = bids[winners], waiting[winners]
        waiting = np.concatenate([np.delete(waiting, winners), outbid[outbid >= 0]])
    return MinWeightMatching(known, np.minimum.reduceat(weights + prices[graph.columns], first[:-1]), -prices)


def _edges_of(first: Integers, rows: Integers) -> tuple[Integers, Integers, Integers]:
    """Edges of the given rows in this order; and the first position and the number of the edges of each row."""
    sizes = first[rows + 1] - first[rows]
    starts = np.cumsum(sizes) - sizes
    return np.repeat(first[rows] - starts, sizes) + np.arange(sizes.sum()), starts, sizes


def _cheapest_edges(graph: Graph, weights: Floats) -> Integers | None:
    """Column of the cheapest edge of each row; None unless they are all different."""
    least = np.minimum.reduceat(weights, graph.row_starts[:-1])
    edges = np.flatnonzero(weights == least[graph.rows])
    _, chosen = np.unique(graph.rows[edges], return_index=True)
    columns = graph.columns[edges[chosen]]
    return columns if len(np.unique(columns)) == len(columns) else None


def _solve_sparse(graph: Graph, weights: Floats, known: Integers) -> Integers:
    """Columns of a minimum-weight matching by SciPy's LAPJVsp (Jonker and Volgenant, Computing 38, 1987).

    SciPy first searches for any matching, which can take exponential time (SciPy issue 26147). If the edge of a known
    matching is first in each row, it finds that matching at once. The additional column without edges makes SciPy skip
    its augmenting row reduction; on nearly equal rows, the number of its steps is their cost difference in units.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    first = graph.row_starts
    chosen = graph.positions(np.arange(graph.shape[0]), known)
    order = np.arange(len(weights))
    order[first[:-1]], order[chosen] = chosen, first[:-1]
    # SciPy removes edges of weight 0.
    data = (weights - weights.min() + 1.0)[order]
    matrix = csr_array((data, graph.columns[order], first), shape=(graph.shape[0], graph.shape[1] + 1))
    rows, columns = min_weight_full_bipartite_matching(matrix)
    return columns[np.argsort(rows)].astype(np.int64)


def _shortest_distances(graph: Graph, lengths: Floats, matched: Integers) -> Floats:
    """Length of the shortest path in the residual graph to each column, at most 0.

    An edge (i, j) leads from the column of row i to column j. Each round of the relaxation (Bellman-Ford) uses the
    edges from the columns improved in the previous round. It terminates because an optimum has no negative cycle.

    Raises:
        ArithmeticError: the matching is not optimal.
    """
    count = graph.shape[0]
    first = graph.row_starts
    distances = np.zeros(graph.shape[1])
    improved = np.arange(count)
    for _ in range(count + 1):
        if not len(improved):
            return distances
        edges = _edges_of(first, improved)[0]
        before = distances.copy()
        candidates = distances[matched[graph.rows[edges]]] + lengths[edges]
        np.minimum.at(distances, graph.columns[edges], candidates)
        improved = np.flatnonzero((distances < before)[matched])
    raise ArithmeticError("the matching is not optimal: its residual graph has a negative cycle")
