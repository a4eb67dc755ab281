"""Matching over a process group: reduce the statistic, solve on rank 0, broadcast and verify."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from dl2pa.assignment.insight import Insight, look_into, with_margin
from dl2pa.assignment.solve import centred_cost, solve_cost
from dl2pa.assignment.statistic import ClassStatistic
from dl2pa.errors import TrainingFailure


@dataclass(frozen=True)
class Matching:
    """What one matching did; all but `seconds` and `insight` is the same on every rank.

    Attributes:
        moved: labels whose prototype changed.
        moves: (label, its old prototype, its new one) of each of them.
        objective_before, objective_after: Σ_c q_c · P[σ(c)] under the old and the new assignment.
        own_cosine: mean cosine of the features since the last matching to their own (old) prototype.
        classes_seen: classes with at least one sample since the last matching.
        seconds: wall time of reduce, solve and broadcast; of a solve in the background what training waited for it.
        insight: on rank 0.
        prototypes_stayed: mean cosine between where a prototype stood and where it stands now; None: they are fixed.
        lag: steps from the statistic to the assignment in force.
    """

    moved: int
    moves: tuple[tuple[int, int, int], ...]
    objective_before: float
    objective_after: float
    own_cosine: float
    classes_seen: int
    seconds: float
    insight: Insight | None
    prototypes_stayed: float | None = None
    lag: int = 0

    def metrics(self) -> dict[str, float]:
        """The numbers that are curves over a run and do not depend on the clock."""
        ours = {
            "moved": self.moved,
            "objective_before": self.objective_before,
            "objective_after": self.objective_after,
            "objective_gain": self.objective_after - self.objective_before,
            "own_cosine": self.own_cosine,
            "classes_seen": self.classes_seen,
        }
        if self.prototypes_stayed is not None:
            ours["prototypes_stayed"] = self.prototypes_stayed
        found = {} if self.insight is None else self.insight.metrics()
        return {name: float(value) for name, value in (ours | found).items()}


def reduce_statistic(statistic: ClassStatistic, group: dist.ProcessGroup | None = None) -> None:
    """Sum the ranks' parts in place: exact, the addends are integers."""
    if dist.is_initialized():
        dist.all_reduce(statistic.sums, group=group)
        dist.all_reduce(statistic.counts, group=group)


@dataclass(frozen=True)
class Taken:
    """What there is to a matching but its assignment; the rows it is found from are then the statistic's.

    Attributes:
        own_cosine, classes_seen: as in `Matching`.
        means_cd, seen_c: mean unit features and shares of the classes, float64.
        seconds: that taking it took.
    """

    own_cosine: float
    classes_seen: int
    means_cd: Tensor
    seen_c: Tensor
    seconds: float

    def look(self) -> Insight:
        """What the features tell."""
        return look_into(self.means_cd.cpu().numpy(), self.seen_c.cpu().numpy())


def match(
    statistic: ClassStatistic,
    prototypes_cd: Tensor,
    assignment_c: Tensor,
    momentum: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Matching:
    """Re-match labels and prototypes; `assignment_c` and the statistic change in place on every rank.

    A collective where there is a process group: every rank calls it, with its own part of the statistic.

    Args:
        statistic: of the features since the last matching; begins anew.
        prototypes_cd: unit rows [C, d].
        assignment_c: σ, int64 [C], in force until now.
        momentum: weight of the rows of the last matching against the new ones.

    Raises:
        TrainingFailure: the ranks hold different assignments afterwards.
    """
    taken = take(statistic, prototypes_cd, assignment_c, momentum, group)
    began = time.perf_counter()
    cost = None
    if is_main(group):
        cost = centred_cost(statistic.rows.cpu().numpy(), prototypes_cd.double().cpu().numpy())
    solved = None if cost is None else solve_cost(cost)
    seconds = taken.seconds + time.perf_counter() - began
    facts = taken.own_cosine, taken.classes_seen
    result = settle(statistic.rows, prototypes_cd, assignment_c, solved, *facts, group)
    insight = None
    if cost is not None:
        insight = with_margin(taken.look(), lambda: cost, assignment_c.cpu().numpy())
    return replace(result, seconds=seconds + result.seconds, insight=insight)


@torch.no_grad()
def take(
    statistic: ClassStatistic,
    prototypes_cd: Tensor,
    assignment_c: Tensor,
    momentum: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Taken:
    """Reduce the statistic to the rows Q of a matching, `statistic.rows`, and begin it anew; a collective."""
    began = time.perf_counter()
    reduce_statistic(statistic, group)
    means, counts = statistic.means()
    points = prototypes_cd.double()
    own = ((means * points[assignment_c]).sum(dim=1) * counts).sum() / counts.sum().clamp(min=1e-300)
    statistic.rows.copy_(statistic.directions(momentum))
    statistic.reset()
    seen = int((counts > 0).sum())
    return Taken(float(own), seen, means, counts, time.perf_counter() - began)


@torch.no_grad()
def settle(
    rows_cd: Tensor,
    prototypes_cd: Tensor,
    assignment_c: Tensor,
    solved_c: NDArray[np.int64] | None,
    own_cosine: float,
    classes_seen: int,
    group: dist.ProcessGroup | None = None,
) -> Matching:
    """Put a new assignment into force on every rank; a collective.

    Args:
        rows_cd: Q, float64 [C, d].
        solved_c: the new σ, where rank 0 calls.
        own_cosine, classes_seen: handed on.

    Returns:
        What it did, without insight; its seconds are those of this call.

    Raises:
        TrainingFailure: the ranks hold different assignments afterwards.
    """
    began = time.perf_counter()
    before = assignment_c.clone()
    if solved_c is not None:
        assignment_c.copy_(torch.from_numpy(solved_c))
    if dist.is_initialized():
        dist.broadcast(assignment_c, group=group, group_src=0)
        verify_same(assignment_c, "assignment", group)
    seconds = time.perf_counter() - began
    points = prototypes_cd.double()
    old, new = before.cpu(), assignment_c.cpu()
    labels = (new != old).nonzero().flatten()
    moves = torch.stack([labels, old[labels], new[labels]], dim=1).tolist()
    return Matching(
        moved=len(moves),
        moves=tuple((label, one, other) for label, one, other in moves),
        objective_before=float((rows_cd * points[before]).sum()),
        objective_after=float((rows_cd * points[assignment_c]).sum()),
        own_cosine=own_cosine,
        classes_seen=classes_seen,
        seconds=seconds,
        insight=None,
    )


def is_main(group: dist.ProcessGroup | None = None) -> bool:
    """Whether this process solves: rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank(group) == 0


def verify_same(tensor: Tensor, what: str, group: dist.ProcessGroup | None = None) -> None:
    """Fail unless every rank holds the same bits.

    Raises:
        TrainingFailure: naming the ranks that differ from rank 0.
    """
    if not dist.is_initialized():
        return
    digest = hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).digest()[:8]
    mine = torch.frombuffer(bytearray(digest), dtype=torch.int64).to(tensor.device)
    hashes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(hashes, mine, group=group)
    differing = [rank for rank, other in enumerate(hashes) if int(other) != int(hashes[0])]
    if differing:
        raise TrainingFailure(f"the {what} of rank(s) {differing} differs from rank 0's after a broadcast")
