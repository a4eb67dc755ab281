"""Retrieval of images of the same class by cosine: recall at k and mean average precision."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dl2pa.errors import UserError

RANKS = (1, 5, 10)
_BLOCK = 1 << 24
"""Maximum number of cosines at once."""


@dataclass(frozen=True)
class Retrieval:
    """Retrieval with every image as a query against all the others.

    Attributes:
        hits: queries with an image of their class among the first k, per k of ``RANKS``.
        average_precision: mean over queries of the average precision, in percent.
        num_queries: images with another image of their class.
        num_alone: images without one, which are not counted as queries.
    """

    hits: tuple[int, ...]
    average_precision: float
    num_queries: int
    num_alone: int

    def metrics(self) -> dict[str, float | int]:
        """Results by name; recalls in percent, and their integer counts."""
        pairs = list(zip(RANKS, self.hits, strict=True))
        recalls = {f"recall_at_{k}": 100.0 * hits / self.num_queries for k, hits in pairs}
        counts = {f"hits_at_{k}": hits for k, hits in pairs}
        numbers = {"num_queries": self.num_queries, "num_alone": self.num_alone}
        return {**recalls, "mean_average_precision": self.average_precision, **counts, **numbers}


def measure_retrieval(features_nd: Tensor, labels_n: Tensor) -> Retrieval:
    """Measure the retrieval of unit features [N, d] with labels [N]; a query does not retrieve itself.

    Equal cosines have no order. Recall at k counts them against the query: its best match must be better than all but
    k - 1 images of other classes. The average precision is the sum over distinct cosines of the precision up to that
    cosine times the gain in recall, as in scikit-learn's ``average_precision_score``.

    Raises:
        UserError: no class has two images (``--retrieval``).
    """
    count = len(labels_n)
    hits, total, queries = torch.zeros(len(RANKS), dtype=torch.int64), 0.0, 0
    rows = max(1, _BLOCK // max(1, count))
    for start in range(0, count, rows):
        block = slice(start, min(start + rows, count))
        cosines = features_nd[block] @ features_nd.T
        places = torch.arange(block.start, block.stop, device=cosines.device)
        cosines[places - start, places] = -math.inf
        matches = labels_n[block, None] == labels_n[None]
        matches[places - start, places] = False
        used = matches.any(dim=1)
        cosines, matches = cosines[used], matches[used]
        hits += _hits(cosines, matches).cpu()
        total += float(_average_precisions(cosines, matches).sum())
        queries += len(cosines)
    if not queries:
        message = "no class has two images to retrieve"
        raise UserError("--retrieval", None, message, "Give a set with several images per class.")
    return Retrieval(tuple(hits.tolist()), 100.0 * total / queries, queries, count - queries)


def _hits(cosines_bn: Tensor, matches_bn: Tensor) -> Tensor:
    """Number of queries with a match among the first k, per k of ``RANKS``, int64."""
    best = cosines_bn.masked_fill(~matches_bn, -math.inf).amax(dim=1, keepdim=True)
    ahead = ((cosines_bn >= best) & ~matches_bn).sum(dim=1)
    return torch.stack([(ahead < k).sum() for k in RANKS])


def _average_precisions(cosines_bn: Tensor, matches_bn: Tensor) -> Tensor:
    """Average precision of each query, float64 [B]."""
    ordered, order = cosines_bn.sort(dim=1, descending=True)
    matched = matches_bn.gather(1, order)
    places = torch.arange(ordered.shape[1], device=ordered.device).expand_as(ordered)
    ends = torch.ones_like(matched)  # whether a place is the last one with its cosine
    ends[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    end = places.masked_fill(~ends, ordered.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    precision = matched.cumsum(dim=1).gather(1, end).double() / (end + 1)
    return (precision * matched).sum(dim=1) / matched.sum(dim=1)
