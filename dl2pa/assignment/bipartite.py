"""Minimum-weight matchings of a sparse bipartite graph with whole-number weights, and their dual potentials."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_BID_ROUNDS = 300
_INCREMENT = 0.01
"""Least increment of a bid, in standard deviations of the weights."""


@dataclass(frozen=True)
class Graph:
    """Edges between rows 0…n−1 and columns 0…C−1, n ≤ C, in the order of (row, column), each pair at most once.

    Attributes:
        shape: (n, C).
        rows, columns: int64 [E].
    """

    shape: tuple[int, int]
    rows: Integers
    columns: Integers

    @classmethod
    def of(cls, shape: tuple[int, int], rows: Integers, columns: Integers) -> Graph:
        """Put the edges in order and drop repeated ones."""
        keys = np.sort(rows * shape[1] + columns, kind="stable")
        first = np.concatenate([[True], keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, dtype=bool)
        return cls(shape, *np.divmod(keys[first], shape[1]))

    @classmethod
    def complete(cls, shape: tuple[int, int]) -> Graph:
        """Every pair."""
        return cls(shape, *np.divmod(np.arange(shape[0] * shape[1]), shape[1]))

    @property
    def edges(self) -> tuple[Integers, Integers]:
        """Rows and columns."""
        return self.rows, self.columns

    def part(self, edges: NDArray[np.bool_]) -> Graph:
        """The graph with some of the edges."""
        return Graph(self.shape, self.rows[edges], self.columns[edges])

    def positions(self, rows: Integers, columns: Integers) -> Integers:
        """Positions of edges among those of the graph; −1 where there is none."""
        keys, wanted = self.rows * self.shape[1] + self.columns, rows * self.shape[1] + columns
        found = np.searchsorted(keys, wanted).clip(max=max(len(keys) - 1, 0))
        return np.where(keys[found] == wanted, found, -1) if len(keys) else np.full(len(wanted), -1)


@dataclass(frozen=True)
class Matched:
    """A matching of least weight that covers every row, with the potentials that prove it.

    Every edge weighs at least row_i + column_j, the matched ones exactly that. Where columns are left over (n < C),
    their potentials are 0 and no column's is positive. So any matching weighs at least Σ row_i + Σ column_j, the weight
    of this one.

    Attributes:
        columns: the column of each row, int64 [n].
        row_potentials, column_potentials: [n], [C].
    """

    columns: Integers
    row_potentials: Floats
    column_potentials: Floats

    @property
    def weight(self) -> float:
        """Total weight."""
        return float(self.row_potentials.sum() + self.column_potentials.sum())

    def slack(self, graph: Graph, weights: Floats) -> Floats:
        """Weights less the potentials of both ends; 0 for every edge of a matching of least weight."""
        return weights - self.row_potentials[graph.rows] - self.column_potentials[graph.columns]

    def optimal_edges(self, graph: Graph, weights: Floats) -> NDArray[np.bool_]:
        """The edges that belong to some matching of least weight; as many as rows where there is only this one.

        Two such matchings differ by cycles of edges without slack, so an edge belongs to one if both its ends are in
        one strong component of the residual graph. The columns left over count as one node there: any row can release
        its column to them whose potential is 0.
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


def match_rows(graph: Graph, weights: Floats, known: Integers, start: Matched | None = None) -> Matched:
    """Match every row at least total weight.

    Weights are whole numbers, and sums of a few of them stay below 2^53, so the arithmetic is exact.

    Args:
        known: the columns of some matching of all rows within the graph, int64 [n].
        start: result for nearly the same edges and weights; makes it faster.
    """
    square = graph.shape[0] == graph.shape[1]
    if square and start is None:
        start = _auction(graph, weights, known)
    if square and start is not None:
        # Less the former potentials nearly all matched edges weigh 0, the least there is.
        change = _match_reduced(graph, start.slack(graph, weights), known)
        rows = start.row_potentials + change.row_potentials
        return Matched(change.columns, rows, start.column_potentials + change.column_potentials)
    return _match_reduced(graph, weights, known)


def _match_reduced(graph: Graph, weights: Floats, known: Integers) -> Matched:
    columns = _cheapest_edges(graph, weights)
    if columns is None:
        columns = _least_weight(graph, weights, known)
    own = weights[graph.positions(np.arange(graph.shape[0]), columns)]
    potentials = _shortest_distances(graph, weights - own[graph.rows], columns)
    return Matched(columns, own - potentials[columns], potentials)


def _auction(graph: Graph, weights: Floats, known: Integers) -> Matched:
    """Potentials near the optimal ones by rows that bid for columns (Bertsekas, Annals of Operations Research 14).

    The columns it returns are those known: the few rows that are still without one after so many rounds have none.
    """
    count = graph.shape[0]
    first = np.searchsorted(graph.rows, np.arange(count + 1))
    prices, owners, waiting = np.zeros(graph.shape[1]), np.full(graph.shape[1], -1), np.arange(count)
    increment = max(1.0, np.rint(_INCREMENT * float(weights.std())))
    for _ in range(_BID_ROUNDS):
        if not len(waiting):
            break
        sizes = first[waiting + 1] - first[waiting]
        starts = np.cumsum(sizes) - sizes
        edges = np.repeat(first[waiting] - starts, sizes) + np.arange(sizes.sum())
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
    return Matched(known, np.minimum.reduceat(weights + prices[graph.columns], first[:-1]), -prices)


def _cheapest_edges(graph: Graph, weights: Floats) -> Integers | None:
    """The column of the cheapest edge of each row, if these are all different."""
    first = np.searchsorted(graph.rows, np.arange(graph.shape[0]))
    least = np.minimum.reduceat(weights, first)
    edges = np.flatnonzero(weights == least[graph.rows])
    _, chosen = np.unique(graph.rows[edges], return_index=True)
    columns = graph.columns[edges[chosen]]
    return columns if len(np.unique(columns)) == len(columns) else None


def _least_weight(graph: Graph, weights: Floats, known: Integers) -> Integers:
    """The columns of a matching of least weight by SciPy's LAPJVsp (Jonker and Volgenant, Computing 38, 1987).

    SciPy first looks for any matching, in time that can grow exponentially (its issue 26147). With the edge of a known
    matching first in each row it finds that one at once. The column without edges makes SciPy leave out its augmenting
    row reduction, whose steps on nearly equal rows number as many as their costs differ in units.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    first = np.searchsorted(graph.rows, np.arange(graph.shape[0] + 1))
    chosen = graph.positions(np.arange(graph.shape[0]), known)
    order = np.arange(len(weights))
    order[first[:-1]], order[chosen] = chosen, first[:-1]
    # SciPy drops edges of weight 0.
    data = (weights - weights.min() + 1.0)[order]
    matrix = csr_array((data, graph.columns[order], first), shape=(graph.shape[0], graph.shape[1] + 1))
    rows, columns = min_weight_full_bipartite_matching(matrix)
    found = np.empty(graph.shape[0], dtype=np.int64)
    found[rows] = columns
    return found


def _shortest_distances(graph: Graph, lengths: Floats, matched: Integers) -> Floats:
    """For each column the length of the shortest path of the residual graph that ends there, at most 0.

    An edge (i, j) leads from the column of row i to column j. The relaxation (Bellman, Ford) takes in each round the
    edges that leave the columns improved in the last one. It ends because no cycle of an optimum is negative.

    Raises:
        ArithmeticError: the matching is not optimal.
    """
    count = graph.shape[0]
    first = np.searchsorted(graph.rows, np.arange(count + 1))
    distances = np.zeros(graph.shape[1])
    improved = np.arange(count)
    for _ in range(count + 1):
        if not len(improved):
            return distances
        sizes = first[improved + 1] - first[improved]
        starts = np.repeat(first[improved] - np.cumsum(sizes) + sizes, sizes)
        edges = starts + np.arange(len(starts))
        before = distances.copy()
        reached = distances[matched[graph.rows[edges]]] + lengths[edges]
        np.minimum.at(distances, graph.columns[edges], reached)
        improved = np.flatnonzero((distances < before)[matched])
    raise ArithmeticError("the matching is not optimal: its residual graph has a negative cycle")
