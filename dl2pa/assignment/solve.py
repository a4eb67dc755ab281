"""The exact assignment of labels to prototypes on a sparse graph, with a certificate over all C² pairs.

Only pairs with a large score can be part of the optimum. The assignment is solved on those, its dual potentials are
compared with every pair that was left out, pairs that contradict them are added, and it is solved again until there
are none: then it is the optimum over all pairs. Scores are rounded to multiples of `QUANTUM`, so sums and comparisons
are exact, and ties are broken by a rule instead of by rounding errors.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from dl2pa.assignment.bipartite import Floats, Graph, Integers, Matched, match_rows
from dl2pa.assignment.scores import Limits, ScoreSearch, lengths

QUANTUM = 2.0**-40
"""Unit of the scores of unit vectors: finer than float32 features can tell apart."""
ALL_PAIRS = 256
"""Classes up to which every pair is a candidate: searching saves nothing there."""
CANDIDATES = 16
"""Candidates per row and per column to begin with."""
_WARM_SHARE = 0.25
"""Share of all pairs above which a new search is cheaper than checking the previous candidates against the limits."""
_MUST = 2.0**46
"""Weight by which covering a column comes before anything else."""


@dataclass(frozen=True)
class Solution:
    """An optimal assignment and how it was found.

    Attributes:
        assignment: σ, int64 [C]: label c has prototype σ[c].
        gap: upper bound on what any other assignment could gain, relative to the objective less its mean over all
            assignments.
        rounds: solves on growing sets of candidates.
        candidates: pairs in the last one, per class.
        candidates_s, solve_s, certificate_s: seconds to find candidates and compute their scores, to solve on them,
            and to compare the potentials with all other pairs.
    """

    assignment: Integers
    gap: float
    rounds: int
    candidates: float
    candidates_s: float
    solve_s: float
    certificate_s: float

    def work(self) -> dict[str, float]:
        """What the solve took. Unlike the assignment it depends on earlier solves and on the clock."""
        return {
            "rounds": float(self.rounds),
            "candidates": self.candidates,
            "candidates_s": self.candidates_s,
            "solve_s": self.solve_s,
            "certificate_s": self.certificate_s,
        }


class AssignmentSolver:
    """Maximize Σ_c q_c · P[σ(c)] over permutations σ exactly.

    The result depends on the arguments of `solve` alone: not on earlier calls, which only save time, nor on devices,
    threads or the number of candidates. Of several optimal assignments (of rounded scores) one is chosen that leaves as
    many labels as possible at their current prototype, then by a fixed order of the pairs.

    Args:
        candidates: per row and per column to begin with.
        all_pairs: classes up to which every pair is a candidate.
    """

    def __init__(self, candidates: int = CANDIDATES, all_pairs: int = ALL_PAIRS) -> None:
        self._candidates = candidates
        self._all_pairs = all_pairs
        self._previous: _Problem | None = None

    def solve(
        self,
        rows_cd: Floats,
        prototypes_cd: Floats,
        current_c: Integers,
        device: torch.device | None = None,
    ) -> Solution:
        """Solve for one statistic.

        Args:
            rows_cd: statistic [C, d]; rows of zeros belong to classes never seen.
            prototypes_cd: P [C, d].
            current_c: the assignment until now, int64 [C].
            device: where candidates are searched for; default: CPU.
        """
        points = prototypes_cd - prototypes_cd.mean(axis=0)
        # Shorter rows have scores that all round to 0: any prototype left over will do for them.
        shortest = 0.5 * QUANTUM / max(float(lengths(points).max()), 1e-300)
        rows, common = rows_cd, np.zeros(rows_cd.shape[1])
        seen = _longer_than(shortest, rows)
        if len(seen) == len(rows):
            # All prototypes are used, so what all rows have in common adds the same to every assignment.
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
    """The optimal σ, int64 [C], of one statistic; see `AssignmentSolver`.

    Args:
        current_c: the assignment until now; default: the identity.
    """
    current = np.arange(len(rows_cd)) if current_c is None else current_c
    return AssignmentSolver().solve(rows_cd, prototypes_cd, current).assignment


class _Problem:
    """One solve: candidates, matching and certificate by turns.

    Weights are scores in units of −`QUANTUM`, rounded to whole numbers.

    Attributes:
        graph: the candidates.
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

    def solve(self, previous: _Problem | None) -> Matched:
        """The optimum over all pairs; `graph` then has every pair that can be part of an optimum."""
        if self._all_pairs:
            self._take_all_pairs()
            return self._match()
        warm = self._continue(previous)
        if not warm:
            self._find_candidates()
        matched = None
        while True:
            matched = self._match(matched)
            missing = self._missing(matched, _WARM_SHARE if warm else 1.0)
            if missing is None:
                self._find_candidates()
                warm = False
            elif not missing:
                return matched

    def choose(self, matched: Matched) -> Integers:
        """Of all optimal matchings the one the rule selects: the column of each row."""
        graph, weights = self.graph, self._weights
        for rule in (self._moves, self._order):
            optimal = matched.optimal_edges(graph, weights)
            if np.count_nonzero(optimal) == graph.shape[0]:
                break
            # A column with a negative potential is covered by every optimal matching.
            covered = (
                matched.column_potentials < 0.0
                if graph.shape[0] < graph.shape[1]
                else np.zeros(graph.shape[1])
            )
            graph = graph.part(optimal)
            weights = rule(*graph.edges) - _MUST * covered[graph.columns]
            matched = match_rows(graph, weights, matched.columns)
        return matched.columns

    def _match(self, start: Matched | None = None) -> Matched:
        self.rounds += 1
        with self._timed("solve"):
            return match_rows(self.graph, self._weights, start.columns if start else self._current, start)

    def _take_all_pairs(self) -> None:
        with self._timed("candidates"):
            self.graph = Graph.complete(self.graph.shape)
            self._weights = _rounded(self._search.exact_all())

    def _find_candidates(self) -> None:
        with self._timed("candidates"):
            rows, columns, self._limits = self._search.largest(self._candidates)
            self._add(rows, columns)

    def _continue(self, previous: _Problem | None) -> bool:
        """Start from the candidates of a problem with the same classes and prototypes, if there is one.

        A score changes by no more than its row moves times the length of the longest prototype; the limits of the
        pairs left out then rise by that.
        """
        if previous is None or not np.array_equal(previous._labels, self._labels):
            return False
        if not np.array_equal(previous._search.points, self._search.points):
            return False
        with self._timed("candidates"):
            moved = lengths(self._search.searched - previous._search.searched)
            limits = previous._limits
            self._limits = Limits(limits.rows + moved * self._search.longest, limits.columns + np.inf)
            self._add(*previous.graph.edges)
        return True

    def _missing(self, matched: Matched, most: float) -> bool | None:
        """Add the pairs that contradict the potentials, and ties; whether there was a contradiction.

        Returns:
            None: more than the share `most` of all pairs would have to be computed.
        """
        with self._timed("certificate"):
            prices = -QUANTUM * matched.column_potentials - self._offsets
            found = self._search.above(-QUANTUM * matched.row_potentials, prices, self._limits, most)
            if found is None:
                return None
            rows, columns = found
            new = self.graph.positions(rows, columns) < 0
            rows, columns = rows[new], columns[new]
            weights = self._weigh(rows, columns)
            slack = weights - matched.row_potentials[rows] - matched.column_potentials[columns]
            wanted = slack <= 0.0
            if wanted.any():
                self._add(rows[wanted], columns[wanted], weights[wanted])
            return bool((slack < 0.0).any())

    def _add(self, rows: Integers, columns: Integers, weights: Floats | None = None) -> None:
        """Add edges to the graph; those it has already stay as they are."""
        graph = Graph.of(
            self.graph.shape,
            np.concatenate([self.graph.rows, rows]),
            np.concatenate([self.graph.columns, columns]),
        )
        known = np.full(len(graph.rows), np.nan)
        known[graph.positions(*self.graph.edges)] = self._weights
        if weights is not None:
            known[graph.positions(rows, columns)] = weights
        unknown = np.flatnonzero(np.isnan(known))
        known[unknown] = self._weigh(graph.rows[unknown], graph.columns[unknown])
        self.graph, self._weights = graph, known

    def _weigh(self, rows: Integers, columns: Integers) -> Floats:
        return _rounded(self._search.exact(rows, columns))

    def _moves(self, rows: Integers, columns: Integers) -> Floats:
        """1 for an edge that gives a label another prototype than its current one."""
        return (self._current[rows] != columns).astype(np.float64)

    def _order(self, rows: Integers, columns: Integers) -> Floats:
        """A number below 2³⁰ for each pair of label and prototype: their fixed order."""
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
    """σ of all labels: the others keep their prototype where it is left over, or get those left over in order."""
    assignment = np.full(len(current), -1)
    assignment[seen] = columns
    free = np.ones(len(current), dtype=bool)
    free[columns] = False
    staying = np.flatnonzero((assignment < 0) & free[current])
    assignment[staying] = current[staying]
    free[current[staying]] = False
    assignment[assignment < 0] = np.flatnonzero(free)
    return assignment
