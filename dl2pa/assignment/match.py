"""Matching over a process group: reduce the statistic, solve on rank 0, broadcast and verify."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from dl2pa.assignment.insight import Insight, look_into
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
        seconds: wall time of reduce, solve and broadcast.
        insight: on rank 0.
    """

    moved: int
    moves: tuple[tuple[int, int, int], ...]
    objective_before: float
    objective_after: float
    own_cosine: float
    classes_seen: int
    seconds: float
    insight: Insight | None

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
        found = {} if self.insight is None else self.insight.metrics()
        return {name: float(value) for name, value in (ours | found).items()}


def reduce_statistic(statistic: ClassStatistic, group: dist.ProcessGroup | None = None) -> None:
    """Sum the ranks' parts in place: exact, the addends are integers."""
    if dist.is_initialized():
        dist.all_reduce(statistic.sums, group=group)
        dist.all_reduce(statistic.counts, group=group)


@torch.no_grad()
def match(
    statistic: ClassStatistic,
    prototypes_cd: Tensor,
    assignment_c: Tensor,
    momentum: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Matching:
    """Re-match labels and prototypes; `assignment_c` and the statistic change in place on every rank.

    A collective: every rank calls it, with its own part of the statistic.

    Raises:
        TrainingFailure: the ranks hold different assignments afterwards.
    """
    began = time.perf_counter()
    reduce_statistic(statistic, group)
    means, counts = statistic.means()
    directions = statistic.directions(momentum)
    points = prototypes_cd.double()
    before = assignment_c.clone()
    own = ((means * points[before]).sum(dim=1) * counts).sum() / counts.sum().clamp(min=1e-300)
    is_main = not dist.is_initialized() or dist.get_rank(group) == 0
    cost = centred_cost(directions.cpu().numpy(), points.cpu().numpy()) if is_main else None
    if cost is not None:
        assignment_c.copy_(torch.from_numpy(solve_cost(cost)))
    if dist.is_initialized():
        dist.broadcast(assignment_c, group=group, group_src=0)
        verify_same(assignment_c, "assignment", group)
    statistic.rows.copy_(directions)
    statistic.reset()
    seconds = time.perf_counter() - began
    after, insight = assignment_c.cpu(), None
    if cost is not None:
        insight = look_into(cost, after.numpy(), means.cpu().numpy(), counts.cpu().numpy())
    labels = (after != before.cpu()).nonzero().flatten()
    moves = torch.stack([labels, before.cpu()[labels], after[labels]], dim=1).tolist()
    return Matching(
        moved=len(moves),
        moves=tuple((label, old, new) for label, old, new in moves),
        objective_before=float((directions * points[before]).sum()),
        objective_after=float((directions * points[assignment_c]).sum()),
        own_cosine=float(own),
        classes_seen=int((counts > 0).sum()),
        seconds=seconds,
        insight=insight,
    )


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
