"""Search for the large ones of all C × C scores q_i · p_j in float32 tiles, without storing all scores."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from dl2pa.assignment.bipartite import Floats, Integers
from dl2pa.osutil import started_pool

_TILE = {"cpu": 2048, "cuda": 8192}
_SAMPLED = 2
"""Minimum expected number of sampled scores above a threshold; with fewer, the number of candidates varies too much."""
_MAX_PAIRS = 4_000_000
_MAX_PAIRS_PER_ROW = 256
"""Limits on the pairs that a comparison returns, in total and per row. Above the larger one, tied pairs are omitted,
because there can be C² of them."""
_TIE = 2e-13
_NONE = np.empty(0, dtype=np.int64)
_CHUNK = 1024
"""Number of pairs rescored at a time, so that their vectors fit into the processor's cache."""


@cache
def thread_pool(threads: int) -> ThreadPoolExecutor | None:
    """Pool for the life of the process; None for one thread."""
    return started_pool(threads, "dl2pa-scores") if threads > 1 else None


os.register_at_fork(after_in_child=thread_pool.cache_clear)  # a forked child has no threads


@dataclass(frozen=True)
class Limits:
    """Upper bounds on the scores that a search did not return: s_ij ≤ min(row_i, column_j).

    Attributes:
        rows: [n].
        columns: [C].
    """

    rows: Floats
    columns: Floats


class ScoreSearch:
    """Search of the scores of rows [n, d] with prototypes [C, d], after subtraction of a common vector from the rows.

    Float32 scores only select pairs. Comparisons allow for their rounding errors, so no pair is missed, and `exact`
    computes the scores of the selected pairs in float64.

    Args:
        rows_nd, points_cd: float64.
        common_d: vector subtracted from every row in a search. If all rows share a direction, the relevant pairs have
            the largest scores without it.
        device: device of the tiles.
    """

    def __init__(self, rows_nd: Floats, points_cd: Floats, common_d: Floats, device: torch.device) -> None:
        self.rows, self.points = rows_nd, points_cd
        self.common, self.searched = common_d, rows_nd - common_d if common_d.any() else rows_nd
        self._device = device
        self._tile = _TILE.get(device.type, _TILE["cpu"])
        # |fl(q·p) − q·p| ≤ d·2⁻²⁴·|q||p| (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), and two
        # further roundings for the conversion of each vector to float32.
        self.longest = float(lengths(points_cd).max())
        unit = (points_cd.shape[1] + 4) * 2.0**-24
        self._error = unit * self.longest * lengths(self.searched)

    @cached_property
    def _rows(self) -> Tensor:
        return self._upload(self.searched)

    @cached_property
    def _points(self) -> Tensor:
        return self._upload(self.points)

    def release(self) -> None:
        """Free the copies on the device; a later search uploads them again."""
        for name in ("_rows", "_points"):
            self.__dict__.pop(name, None)

    def largest(self, count: int) -> tuple[Integers, Integers, Limits]:
        """Find about `count` largest scores of each row and of each column.

        Returns:
            Row and column numbers of the pairs, and upper bounds on the other scores.
        """
        rows = self._sampled(self._rows, self._points, count)
        points = self._sampled(self._points, self._rows, count)
        pairs: list[tuple[Integers, Integers]] = []
        for down in _tiles(len(rows), self._tile):
            for across in _tiles(len(points), self._tile):
                threshold = torch.minimum(rows[down, None], points[across])
                i, j = _above(self._rows[down], self._points[across], threshold)
                pairs.append((i + down.start, j + across.start))
        first, second = (np.concatenate(part) for part in zip(*pairs, strict=True))
        limits = Limits(
            rows.double().cpu().numpy() + self._error, points.double().cpu().numpy() + self._error.max()
        )
        return first, second, limits

    def above(
        self, rows_n: Floats, columns_c: Floats, limits: Limits, max_share: float = 1.0
    ) -> tuple[Integers, Integers] | None:
        """Find the pairs with a score of at least row_i + column_j, except those that the limits exclude.

        The limits permit only pairs with column_j ≤ row limit_i − row_i. If the rows are sorted by that difference and
        the columns by `columns_c`, these pairs form a staircase; other tiles are skipped.

        Returns:
            Row and column numbers, including some pairs with a slightly smaller score; None if more than the share
            `max_share` of all pairs would have to be computed.
        """
        scale = float(np.abs(rows_n).max(initial=0.0) + np.abs(columns_c).max(initial=0.0))
        slack = self._error + 2.0**-22 * scale
        reach = limits.rows - rows_n + slack
        row_order, column_order = np.argsort(-reach, kind="stable"), np.argsort(columns_c, kind="stable")
        columns_c, floors = columns_c[column_order], (rows_n - slack)[row_order]
        widths = np.searchsorted(columns_c, reach[row_order])
        if widths.sum() > max_share * len(rows_n) * len(columns_c):
            return None
        if not widths.any():
            return _NONE, _NONE
        allowed = limits.columns[column_order] - columns_c
        ordered = self._points[torch.from_numpy(column_order).to(self._device)]
        pairs: list[tuple[Integers, Integers]] = [(_NONE, _NONE)]
        total = 0
        for start in range(0, len(rows_n), self._tile):
            part = slice(start, start + self._tile)
            numbers, floor, least = row_order[part], floors[part], floors[part].min()
            block = self._rows[torch.from_numpy(numbers).to(self._device)]
            for left in range(0, int(widths[start]), self._tile):
                across = slice(left, min(left + self._tile, int(widths[start])))
                if allowed[across].max() < least:
                    continue
                threshold = self._upload(floor)[:, None] + self._upload(columns_c[across])
                i, j = _above(block, ordered[across], threshold)
                total += len(i)
                if total > max(_MAX_PAIRS, _MAX_PAIRS_PER_ROW * len(rows_n)):
                    exact = self.searched[numbers] @ self.points[column_order[across]].T
                    i, j = np.nonzero(exact > rows_n[numbers, None] + columns_c[across] + _TIE)
                pairs.append((numbers[i], column_order[across][j]))
        first, second = (np.concatenate(part) for part in zip(*pairs, strict=True))
        return first, second

    def exact(self, first: Integers, second: Integers) -> Floats:
        """Float64 scores of the given pairs, bit-identical for any number of threads."""

        def chunk(start: int) -> Floats:
            part = slice(start, start + _CHUNK)
            return np.einsum("ed,ed->e", self.rows[first[part]], self.points[second[part]])

        pool = thread_pool(torch.get_num_threads())
        parts = (
            pool.map(chunk, range(0, len(first), _CHUNK))
            if pool
            else map(chunk, range(0, len(first), _CHUNK))
        )
        return np.concatenate([np.empty(0), *parts])

    def exact_all(self) -> Floats:
        """Float64 scores of all pairs in row order, bit-identical to `exact`; a matrix product is not."""
        shape = self.points.shape
        return np.concatenate(
            [np.einsum("ed,ed->e", np.broadcast_to(row, shape), self.points) for row in self.rows]
        )

    def _sampled(self, queries: Tensor, others: Tensor, count: int) -> Tensor:
        """Estimate on a sample, for each query, the score that about `count` of the others exceed."""
        total = len(others)
        size = min(total, max(1024, math.ceil(_SAMPLED * total / count)))
        rank = max(1, round(count * size / total))
        chosen = np.random.default_rng(total).permutation(total)[:size]
        sample = others[torch.from_numpy(chosen).to(self._device)]
        if rank >= size:
            return torch.full((len(queries),), -math.inf, device=self._device)
        parts = _tiles(len(queries), self._tile)
        return torch.cat([_product(queries[part], sample).topk(rank, dim=1).values[:, -1] for part in parts])

    def _upload(self, values: Floats) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(self._device)


def lengths(rows_nd: Floats) -> Floats:
    """Norm of each row, several times as fast as NumPy's norm."""
    return np.sqrt(np.einsum("nd,nd->n", rows_nd, rows_nd))


def _tiles(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _above(rows: Tensor, points: Tensor, threshold: Tensor) -> tuple[Integers, Integers]:
    """Row and column numbers of the scores above the threshold in a tile."""
    pairs = (_product(rows, points) > threshold).flatten().nonzero().flatten().cpu().numpy()
    return np.divmod(pairs, len(points))


def _product(rows: Tensor, points: Tensor) -> Tensor:
    """Scores in full float32, even if training uses TF32 or bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return rows @ points.T
    finally:
        torch.set_float32_matmul_precision(before)
