"""Assignment by class similarity: similar classes get similar prototypes, whatever the rotation of the prototypes.

Given unit rows a_i that describe the classes, with similarities G_ij = a_i · a_j, maximize Σ_{i≠j} G_ij p_σ(i) · p_σ(j)
over permutations σ, a quadratic assignment problem. With Y = P[σ] and all rows of length 1, the objective is
‖Aᵀ Y‖² − ‖Y‖². It is computed from the factors A [C, k] and Y [C, d]; no C × C matrix is needed.

Frank-Wolfe steps (Vogelstein et al., "Fast approximate quadratic programming for graph matching", PLOS ONE 2015)
maximize it over convex combinations of permutations: each step is an exact linear assignment along the gradient
A (Aᵀ Y) − Y, and an exact line search. The result is the nearest permutation, improved by swaps of two labels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from dl2pa.assignment.bipartite import Floats, Integers
from dl2pa.assignment.solve import AssignmentSolver

_STARTS, _STARTS_OF_MANY, _MANY_CLASSES = 32, 4, 256
"""Numbers of random starts besides the current assignment, up to 256 classes and beyond."""
_STEPS = 30
_ROUNDS = 20
_BLOCK = 1024
_TOLERANCE = 1e-9
_EXACT_BITS = 52
"""Integers of this length and shorter are exact in float64."""
_DENSE_CLASSES = 1024
"""Up to this number of classes, SciPy's dense linear assignment is faster than the sparse solver."""


@dataclass(frozen=True)
class QuadraticSolution:
    """An assignment and its objective.

    Attributes:
        assignment: σ, int64 [C].
        seconds: computation time.
        gap: None; no bound on the distance from the optimum is known.
    """

    assignment: Integers
    seconds: float
    gap: None = None

    def work(self) -> dict[str, float]:
        """Return the seconds, which depend on the machine."""
        return {"solve_s": self.seconds}


class QuadraticSolver:
    """Solver of an assignment update that takes the class directions of any space."""

    def solve(
        self,
        rows_ck: Floats,
        prototypes_cd: Floats,
        current_c: Integers,
        device: torch.device | None = None,
    ) -> QuadraticSolution:
        """Assign by the similarity of the class directions [C, k]; zero rows for classes without samples."""
        return solve_quadratic(similarity_factor(rows_ck), prototypes_cd, current_c)


def similarity_factor(directions_ck: Floats) -> Floats:
    """Return A: the rows of observed classes minus their mean, normalized; zero rows for the others.

    Args:
        directions_ck: mean direction of each class, [C, k]; zero for a class without samples.
    """
    seen = np.linalg.norm(directions_ck, axis=1) > 0
    rows = np.zeros_like(directions_ck)
    if seen.any():
        rows[seen] = directions_ck[seen] - directions_ck[seen].mean(axis=0)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 1e-6)


def alignment(factor_ck: Floats, prototypes_cd: Floats, assignment_c: Integers) -> float:
    """Return tr(Yᵀ G Y) / ((C / d) Σ_{i≤d} λ_i) with Y = P[σ] and λ the eigenvalues of G, largest first.

    The denominator is the maximum over all Y with Yᵀ Y = (C / d) I, which evenly spread prototypes satisfy.
    """
    dim = prototypes_cd.shape[1]
    smaller = factor_ck if len(factor_ck) < factor_ck.shape[1] else factor_ck.T
    values = np.linalg.eigvalsh(smaller @ smaller.T)[::-1][:dim]
    bound = len(factor_ck) / dim * float(values.sum())
    return _square(factor_ck.T @ prototypes_cd[assignment_c]) / max(bound, 1e-300)


def solve_quadratic(
    factor_ck: Floats, prototypes_cd: Floats, current_c: Integers, starts: int | None = None
) -> QuadraticSolution:
    """Find a good assignment: the best local optimum of several starts; never worse than the current assignment.

    Products are computed from multiples of a power of two, so that sums are exact and the result does not depend on
    the number of threads.

    Args:
        factor_ck: A, unit or zero rows.
        prototypes_cd: unit rows P.
        current_c: current σ; kept if no better assignment is found.
        starts: number of random starts besides the current assignment; default: by the number of classes.
    """
    if starts is None:
        starts = _STARTS if len(current_c) <= _MANY_CLASSES else _STARTS_OF_MANY
    began = time.perf_counter()
    problem = _Problem(factor_ck, prototypes_cd)
    before = problem.value(current_c)
    best, most = current_c.copy(), before + _TOLERANCE * len(current_c)
    for start in problem.starts(current_c, starts):
        found = problem.polish(problem.ascend(problem.relax(start)))
        value = problem.value(found)
        if value > most:
            best, most = found, value
    return QuadraticSolution(best, time.perf_counter() - began)


class _Problem:
    """The objective ‖Aᵀ P[σ]‖² and the steps that increase it."""

    def __init__(self, factor_ck: Floats, prototypes_cd: Floats) -> None:
        self._bits = (_EXACT_BITS - int(np.ceil(np.log2(max(2, len(factor_ck)))))) // 2
        self.factor, self.points = self._on_grid(factor_ck), self._on_grid(prototypes_cd)
        self._solver = AssignmentSolver()

    def value(self, assignment_c: Integers) -> float:
        return _square(self.factor.T @ self.points[assignment_c])

    def starts(self, current_c: Integers, count: int) -> list[Floats]:
        """Initial Y: P with the current assignment, and midpoints between the mean of all permutations and random ones.

        A random one assigns the principal coordinates of A, rotated at random, to the prototypes.
        """
        dim = self.points.shape[1]
        left, values, _ = np.linalg.svd(self.factor, full_matrices=False)
        coordinates = np.zeros_like(self.points)
        coordinates[:, : len(values)] = (left * values)[:, :dim]
        mean, found = self.points.mean(axis=0), [self.points[current_c]]
        for seed in range(count):
            rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))
            random = self._linear(self._on_grid(coordinates @ rotation), current_c)
            found.append(0.5 * (mean + self.points[random]))
        return found

    def relax(self, start_cd: Floats) -> Integers:
        """Frank-Wolfe steps from Y; returns the permutation nearest to the result."""
        y = self._on_grid(start_cd)
        sigma = np.arange(len(y))
        for _ in range(_STEPS):
            m = self.factor.T @ y
            sigma = self._linear(self.factor @ self._on_grid(m) - y, sigma)
            step = self.points[sigma] - y
            n = self.factor.T @ step
            slope = 2.0 * float((m * n).sum() - (y * step).sum())
            if slope <= _TOLERANCE * len(y):
                break
            curve = _square(n) - _square(step)
            length = 1.0 if curve >= 0 else min(1.0, -slope / (2.0 * curve))
            y = self._on_grid(y + length * step)
        return self._linear(y, sigma)

    def ascend(self, sigma: Integers) -> Integers:
        """Linear assignments along the gradient of ‖Aᵀ Y‖², which is convex: no step decreases it."""
        value = self.value(sigma)
        for _ in range(_ROUNDS):
            m = self.factor.T @ self.points[sigma]
            new = self._linear(self.factor @ self._on_grid(m), sigma)
            gained = self.value(new) - value
            if gained <= _TOLERANCE * len(sigma):
                break
            sigma, value = new, value + gained
        return sigma

    def polish(self, sigma: Integers) -> Integers:
        """Swap the prototypes of two labels while a swap increases the objective."""
        sigma = sigma.copy()
        for _ in range(_ROUNDS):
            pairs = self._promising_swaps(sigma)
            m = self.factor.T @ self.points[sigma]
            swapped = False
            for i, j in pairs:
                direction = self.factor[i] - self.factor[j]
                step = self.points[sigma[j]] - self.points[sigma[i]]
                gain = 2.0 * float(direction @ m @ step) + _square(direction) * _square(step)
                if gain > _TOLERANCE:
                    sigma[[i, j]] = sigma[[j, i]]
                    m = m + np.outer(direction, step)
                    swapped = True
            if not swapped:
                break
        return sigma

    def _promising_swaps(self, sigma: Integers) -> list[tuple[int, int]]:
        """For each label the partner of its best swap, if that increases the objective; largest gain first.

        The gain is 2 (b_i − b_j) · (y_j − y_i) + ‖a_i − a_j‖² ‖y_i − y_j‖², with b the rows of A Aᵀ Y.
        """
        y = self.points[sigma]
        b = self.factor @ self._on_grid(self.factor.T @ y)
        own = (b * y).sum(axis=1)
        norms, lengths = np.square(self.factor).sum(axis=1), np.square(y).sum(axis=1)
        found: list[tuple[float, int, int]] = []
        for first in range(0, len(y), _BLOCK):
            rows = np.arange(first, min(len(y), first + _BLOCK))
            gain = b[rows] @ y.T + y[rows] @ b.T - own[rows, None] - own
            apart = norms[rows, None] + norms - 2.0 * self.factor[rows] @ self.factor.T
            gain = 2.0 * gain + apart * (lengths[rows, None] + lengths - 2.0 * y[rows] @ y.T)
            partners = gain.argmax(axis=1)
            best = gain[np.arange(len(rows)), partners]
            found += [
                (-float(g), int(i), int(j))
                for g, i, j in zip(best, rows, partners, strict=True)
                if g > _TOLERANCE
            ]
        return [(i, j) for _, i, j in sorted(found)]

    def _linear(self, rows_cd: Floats, current_c: Integers) -> Integers:
        if len(rows_cd) <= _DENSE_CLASSES:
            return linear_sum_assignment(rows_cd @ self.points.T, maximize=True)[1]
        return self._solver.solve(rows_cd, self.points, current_c).assignment

    def _on_grid(self, values: Floats) -> Floats:
        return np.rint(values * 2.0**self._bits) / 2.0**self._bits


def _square(values: Floats) -> float:
    return float(np.square(values).sum())
