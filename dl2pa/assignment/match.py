"""Matching over a process group: reduce the statistic, solve on rank 0, broadcast and verify."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch import distributed as dist

from dl2pa.assignment.diagnostics import MatchDiagnostics, compute_diagnostics, with_margin
from dl2pa.assignment.solve import AssignmentSolver, Solution
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
        solution: how the assignment was found; on rank 0.
        prototypes_stayed: mean cosine between where a prototype stood and where it stands now; None: they are fixed.
    """

    moved: int
    moves: tuple[tuple[int, int, int], ...]
    objective_before: float
    objective_after: float
    own_cosine: float
    classes_seen: int
    seconds: float
    diagnostics: MatchDiagnostics | None
    solution: Solution | None = None
    prototypes_stayed: float | None = None

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
        found = {} if self.diagnostics is None else self.diagnostics.metrics()
        return {name: float(value) for name, value in (ours | found).items()}


def reduce_statistic(statistic: ClassStatistic, group: dist.ProcessGroup | None = None) -> None:
    """Sum the ranks' parts in place: exact, the addends are integers."""
    if dist.is_initialized():
        dist.all_reduce(statistic.sums, group=group)
        dist.all_reduce(statistic.counts, group=group)


@dataclass(frozen=True)
class ReducedStatistics:
    """What an assignment update is computed from, besides `ClassStatistic.rows`.

    Attributes:
        own_cosine, classes_seen: as in `Matching`.
        means_cd, seen_c: mean unit features and shares of the classes, float64.
        seconds: time it took.
    """

    own_cosine: float
    classes_seen: int
    means_cd: Tensor
    seen_c: Tensor
    seconds: float

    def diagnostics(self) -> MatchDiagnostics:
        """Diagnostics of the features; the margin is left open."""
        return compute_diagnostics(self.means_cd.cpu().numpy(), self.seen_c.cpu().numpy())


def match(
    statistic: ClassStatistic,
    prototypes_cd: Tensor,
    assignment_c: Tensor,
    momentum: float = 0.0,
    group: dist.ProcessGroup | None = None,
    solver: AssignmentSolver | None = None,
) -> Matching:
    """Update the assignment; `assignment_c` and the statistic change in place on every rank.

    A collective where there is a process group: every rank calls it, with its own part of the statistic.

    Args:
        statistic: of the features since the last update; reset.
        prototypes_cd: unit rows [C, d].
        assignment_c: current σ, int64 [C].
        momentum: weight of the rows of the last update against the new ones.
        solver: one that solved the last update is faster; the result is the same.

    Raises:
        TrainingFailure: the ranks hold different assignments afterward.
    """
    reduced = reduce_statistics(statistic, prototypes_cd, assignment_c, momentum, group)
    began = time.perf_counter()
    problem = solution = None
    if is_main(group):
        problem = statistic.rows.cpu().numpy(), prototypes_cd.double().cpu().numpy()
        current = assignment_c.cpu().numpy()
        solution = (solver or AssignmentSolver()).solve(*problem, current, statistic.rows.device)
    seconds = reduced.seconds + time.perf_counter() - began
    result = apply_assignment(statistic.rows, prototypes_cd, assignment_c, reduced, solution, group)
    diagnostics = None
    if problem is not None and solution is not None:
        diagnostics = with_margin(reduced.diagnostics(), *problem, solution.assignment)
    return replace(result, seconds=seconds + result.seconds, diagnostics=diagnostics)


@torch.no_grad()
def reduce_statistics(
    statistic: ClassStatistic,
    prototypes_cd: Tensor,
    assignment_c: Tensor,
    momentum: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> ReducedStatistics:
    """All-reduce the statistic to the rows Q of an update, `statistic.rows`, and reset it; a collective."""
    began = time.perf_counter()
    reduce_statistic(statistic, group)
    means, counts = statistic.means()
    points = prototypes_cd.double()
    own = ((means * points[assignment_c]).sum(dim=1) * counts).sum() / counts.sum().clamp(min=1e-300)
    statistic.rows.copy_(statistic.directions(momentum))
    statistic.reset()
    seen = int((counts > 0).sum())
    return ReducedStatistics(float(own), seen, means, counts, time.perf_counter() - began)


@torch.no_grad()
def apply_assignment(
    rows_cd: Tensor,
    prototypes_cd: Tensor,
    assignment_c: Tensor,
    reduced: ReducedStatistics,
    solution: Solution | None,
    group: dist.ProcessGroup | None = None,
) -> Matching:
    """Broadcast a new assignment and make it the current one on every rank; a collective.

    Args:
        rows_cd: Q, float64 [C, d].
        solution: the new σ, on rank 0.

    Returns:
        The update without insight; its seconds are those of this call.

    Raises:
        TrainingFailure: the ranks hold different assignments afterward.
    """
    began = time.perf_counter()
    before = assignment_c.clone()
    if solution is not None:
        assignment_c.copy_(torch.from_numpy(solution.assignment))
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
        own_cosine=reduced.own_cosine,
        classes_seen=reduced.classes_seen,
        seconds=seconds,
        diagnostics=None,
        solution=solution,
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
