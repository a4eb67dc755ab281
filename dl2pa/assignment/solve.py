"""Exact assignment of labels to prototypes on a sparse graph, with a certificate over all C² pairs.

An optimal assignment mostly consists of pairs with a large score. So the problem is first solved on these candidate
pairs, which also gives dual potentials, one per label and one per prototype. A pair outside the candidates can improve
the assignment only if its score exceeds the sum of its two potentials. Such pairs are added to the candidates, and the
problem is solved again. Once there is no such pair, the assignment is optimal over all pairs. Scores are rounded to
multiples of `QUANTUM`, so that sums and comparisons are exact and ties are broken by a rule, not by rounding errors.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from dl2pa.assignment.bipartite import Floats, Graph, Integers, MinWeightMatching, match_rows
from dl2pa.assignment.scores import Limits, ScoreSearch, lengths, thread_pool

QUANTUM = 2.0**-40
"""Scores are rounded to multiples of this number, which is finer than the resolution of float32 features."""
ALL_PAIRS = 256
"""Up to this number of classes every pair is a candidate, because a search would not save time."""
CANDIDATES = 16
"""Initial number of candidates per row and per column."""
_WARM_SHARE = 0.25
"""If the limits of the previous search leave more than this share of all pairs to check, a new search is faster."""
_COVER = 2.0**46
"""Subtracted from the weights of columns that must be covered, so that covering them outweighs the tie-breaking."""


@dataclass(frozen=True)
class Solution:
    """An optimal assignment and measurements of the solver.

    Attributes:
        assignment: σ, int64 [C]; label c has prototype σ[c].
        gap: upper bound on how much the unrounded objective of another assignment can exceed that of this one, divided
            by the objective minus its mean over all assignments.
        rounds: number of times the problem was solved, each time with more candidates.
        candidates: number of candidates per class in the last round.
        candidates_s, solve_s, certificate_s: seconds to find the candidates and compute their scores, to solve the
            problem on them, and to compare the potentials with the scores of all other pairs.
    """

    assignment: Integers
    gap: float
    rounds: int
    candidates: float
    candidates_s: float
    solve_s: float
    certificate_s: float

    def work(self) -> dict[str, float]:
        """Return rounds, candidates and seconds, which depend on earlier solves and on the machine."""
        return {
            "rounds": float(self.rounds),
            "candidates": self.candidates,
            "candidates_s": self.candidates_s,
            "solve_s": self.solve_s,
            "certificate_s": self.certificate_s,
        }


class AssignmentSolver:
    """Maximize Σ_c q_c · P[σ(c)] over permutations σ exactly, where q_c is row c of Q.

    The result depends only on Q, the prototypes and the current assignment. The device, the number of threads, the
    number of candidates and earlier calls affect only the time. If several assignments are optimal for the rounded
    scores, the solver selects one in which as many labels as possible keep their current prototype; a fixed order of
    the pairs breaks further ties.

    Args:
        candidates: initial number of candidates per row and per column.
        all_pairs: maximum number of classes for which every pair is a candidate.
    """

    def __init__(self, candidates: int = CANDIDATES, all_pairs: int = ALL_PAIRS) -> None:
        self._candidates = candidates
        self._all_pairs = all_pairs
        thread_pool(torch.get_num_threads())
        self._previous: _Problem | None = None

    def solve(
        self,
        rows_cd: Floats,
        prototypes_cd: Floats,
        current_c: Integers,
        device: torch.device | None = None,
    ) -> Solution:
        """Find the optimal assignment of one update.

        Args:
            rows_cd: Q [C, d]; zero rows for classes without samples.
            prototypes_cd: P [C, d].
            current_c: current assignment, int64 [C].
            device: device on which candidates are searched; default: CPU.
        """
        points = prototypes_cd - prototypes_cd.mean(axis=0)
        # If a row is not longer than this, its scores round to 0 and its label can get any remaining prototype.
        shortest = 0.5 * QUANTUM / max(float(lengths(points).max()), 1e-300)
        rows, common = rows_cd, np.zeros(rows_cd.shape[1])
        seen = _longer_than(shortest, rows)
        if len(seen) == len(rows):
            # Every prototype is used once, so subtracting the mean row changes all objectives by the same amount.
            rows = rows_cd - rows_cd.mean(axis=0)
            seen = _longer_than(shortest, rows)
        elif len(seen):
            common = rows[seen].mean(axis=0)
        if not len(seen):
            return Solution(current_c.copy(), 0.0, 0, 0.0, 0.0, 0.0, 0.0)
        search = ScoreSearch(
            rows if len(seen) == len(rows) else rows[seen], points, common, device or torch.device("cpu")
        )
        problem = _Problem(search, seen, current_c[seen], self._candidates, len(rows) <= self._all_pairs)
        matched = problem.solve(self._previous)
        search.release()
        self._previous = problem
        error = len(rows) * QUANTUM
        return Solution(
            assignment=_fill(problem.choose(matched), seen, current_c),
            gap=error / max(abs(matched.weight * QUANTUM), error),
            rounds=problem.rounds,
            candidates=len(problem.graph.rows) / len(rows),
            candidates_s=problem.seconds["candidates"],
            solve_s=problem.seconds["solve"],
            certificate_s=problem.seconds["certificate"],
        )


def solve_assignment(rows_cd: Floats, prototypes_cd: Floats, current_c: Integers | None = None) -> Integers:
    """Return the optimal σ, int64 [C], without reusing earlier work; see `AssignmentSolver`.

    Args:
        current_c: current assignment; default: the identity.
    """
    current = np.arange(len(rows_cd)) if current_c is None else current_c
    return AssignmentSolver().solve(rows_cd, prototypes_cd, current).assignment


class _Problem:
    """One assignment problem: add candidates, find the matching and check the certificate, until it is valid.

    The weights to be minimized are scores divided by −`QUANTUM` and rounded to integers.

    Attributes:
        graph: the candidate pairs, as edges.
        rounds, seconds: as in `Solution`.
    """

    def __init__(
        self, search: ScoreSearch, labels: Integers, current: Integers, candidates: int, all_pairs: bool
    ) -> None:
        self._search, self._labels, self._current = search, labels, current
        self._candidates, self._all_pairs = candidates, all_pairs
        self._offsets = search.points @ search.common
        shape = len(search.rows), len(search.points)
        self.graph = Graph.of(shape, np.arange(shape[0]), current)
        self._weights = self._weigh(*self.graph.edges)
        self._limits = Limits(np.full(shape[0], np.inf), np.full(shape[1], np.inf))
        self.rounds = 0
        self.seconds = {"candidates": 0.0, "solve": 0.0, "certificate": 0.0}

    def solve(self, previous: _Problem | None) -> MinWeightMatching:
        """Find an optimum over all pairs. Afterwards `graph` contains every pair that belongs to any optimum."""
        if self._all_pairs:
            self._add_all_pairs()
            return self._match()
        warm = self._continue(previous)
        if not warm:
            self._find_candidates()
        matched = None
        while True:
            matched = self._match(matched)
            missing = self._add_missing(matched, _WARM_SHARE if warm else 1.0)
            if missing is None:
                self._find_candidates()
                warm = False
            elif not missing:
                return matched

    def choose(self, matched: MinWeightMatching) -> Integers:
        """Return the columns of the optimal matching that the tie-breaking rules select."""
        graph, weights = self.graph, self._weights
        for rule in (self._moves, self._order):
            optimal = matched.optimal_edges(graph, weights)
            if np.count_nonzero(optimal) == graph.shape[0]:
                break
            # Every optimal matching covers the columns with a negative potential.
            covered = (matched.column_potentials < 0.0) & (graph.shape[0] < graph.shape[1])
            graph = graph.subgraph(optimal)
            weights = rule(*graph.edges) - _COVER * covered[graph.columns]
            matched = match_rows(graph, weights, matched.columns)
        return matched.columns

    def _match(self, start: MinWeightMatching | None = None) -> MinWeightMatching:
        self.rounds += 1
        with self._timed("solve"):
            return match_rows(self.graph, self._weights, start.columns if start else self._current, start)

    def _add_all_pairs(self) -> None:
        with self._timed("candidates"):
            self.graph = Graph.complete(self.graph.shape)
            self._weights = _rounded(self._search.exact_all())

    def _find_candidates(self) -> None:
        with self._timed("candidates"):
            rows, columns, self._limits = self._search.largest(self._candidates)
            self._add(rows, columns)

    def _continue(self, previous: _Problem | None) -> bool:
        """Start from the candidates of the previous problem if it has the same labels and prototypes.

        `Limits` bound the scores of pairs that are not candidates. A score changes by at most the distance that its row
        moved times the norm of the longest prototype, so the limit of each row is increased by that product.

        Returns:
            Whether the previous candidates could be used.
        """
        if previous is None or not np.array_equal(previous._labels, self._labels):
            return False
        if not np.array_equal(previous._search.points, self._search.points):
            return False
        with self._timed("candidates"):
            moved = lengths(self._search.searched - previous._search.searched)
            limits = previous._limits
            columns = np.full_like(limits.columns, np.inf)
            self._limits = Limits(limits.rows + moved * self._search.longest, columns)
            self._add(*previous.graph.edges)
        return True

    def _add_missing(self, matched: MinWeightMatching, max_share: float) -> bool | None:
        """Add the pairs outside the graph with slack ≤ 0, the weight minus the two potentials of the pair.

        Returns:
            Whether a slack was negative, so that the matching may not be optimal; None if more than the share
            `max_share` of all pairs would have to be computed.
        """
        with self._timed("certificate"):
            prices = -QUANTUM * matched.column_potentials - self._offsets
            pairs = self._search.above(-QUANTUM * matched.row_potentials, prices, self._limits, max_share)
            if pairs is None:
                return None
            rows, columns = pairs
            new = self.graph.positions(rows, columns) < 0
            rows, columns = rows[new], columns[new]
            weights = self._weigh(rows, columns)
            slack = weights - matched.row_potentials[rows] - matched.column_potentials[columns]
            added = slack <= 0.0
            if added.any():
                self._add(rows[added], columns[added], weights[added])
            return bool((slack < 0.0).any())

    def _add(self, rows: Integers, columns: Integers, weights: Floats | None = None) -> None:
        """Add edges to the graph; edges that it already contains are unchanged."""
        graph = Graph.of(
            self.graph.shape,
            np.concatenate([self.graph.rows, rows]),
            np.concatenate([self.graph.columns, columns]),
        )
        updated = np.full(len(graph.rows), np.nan)
        updated[graph.positions(*self.graph.edges)] = self._weights
        if weights is not None:
            updated[graph.positions(rows, columns)] = weights
        unknown = np.flatnonzero(np.isnan(updated))
        updated[unknown] = self._weigh(graph.rows[unknown], graph.columns[unknown])
        self.graph, self._weights = graph, updated

    def _weigh(self, rows: Integers, columns: Integers) -> Floats:
        return _rounded(self._search.exact(rows, columns))

    def _moves(self, rows: Integers, columns: Integers) -> Floats:
        """Return 1 for edges that change the prototype of a label, else 0."""
        return (self._current[rows] != columns).astype(np.float64)

    def _order(self, rows: Integers, columns: Integers) -> Floats:
        """Return a fixed pseudo-random number below 2³⁰ for each pair of label and prototype."""
        mixed = self._labels[rows].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed += columns.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return (mixed >> np.uint64(34)).astype(np.float64)

    @contextmanager
    def _timed(self, part: str) -> Generator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began


def _rounded(scores: Floats) -> Floats:
    return np.rint(scores / -QUANTUM)


def _longer_than(length: float, rows: Floats) -> Integers:
    return np.flatnonzero(lengths(rows) > length)


def _fill(columns: Integers, seen: Integers, current: Integers) -> Integers:
    """Extend σ from the labels `seen` to all labels.

    The others keep their prototype if it is free; the rest get the remaining prototypes in order.
    """
    assignment = np.full(len(current), -1)
    assignment[seen] = columns
    free = np.ones(len(current), dtype=bool)
    free[columns] = False
    kept = np.flatnonzero((assignment < 0) & free[current])
    assignment[kept] = current[kept]
    free[current[kept]] = False
    assignment[assignment < 0] = np.flatnonzero(free)
    return assignment
