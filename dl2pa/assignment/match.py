"""Assignment update over a process group: reduce the statistic, solve on rank 0, broadcast and verify."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch import distributed as dist

from dl2pa.assignment.bipartite import Floats
from dl2pa.assignment.diagnostics import MatchDiagnostics, compute_diagnostics, with_alignment, with_margin
from dl2pa.assignment.quadratic import QuadraticSolution, QuadraticSolver
from dl2pa.assignment.solve import AssignmentSolver, Solution
from dl2pa.assignment.statistic import ClassStatistic
from dl2pa.errors import TrainingFailure
from dl2pa.geometry import directions_of_seen


@dataclass(frozen=True)
class Matching:
    """Result of an assignment update; identical on every rank but for `seconds`, `diagnostics` and `solution`.

    Attributes:
        moved: number of labels whose prototype changed.
        moves: (label, old prototype, new prototype) for each of them.
        objective_before, objective_after: Σ_c q_c · P[σ(c)] with the old and the new assignment.
        own_cosine: mean cosine of the features since the last update to the (old) prototype of their class.
        classes_seen: number of classes with samples since the last update.
        seconds: wall time of reduce, solve and broadcast.
        diagnostics: rank 0 only.
        solution: the solver's result; rank 0 only.
        prototypes_stayed: mean cosine between old and new prototypes; None if prototypes are fixed.
    """

    moved: int
    moves: tuple[tuple[int, int, int], ...]
    objective_before: float
    objective_after: float
    own_cosine: float
    classes_seen: int
    seconds: float
    diagnostics: MatchDiagnostics | None
    solution: Solution | QuadraticSolution | None = None
    prototypes_stayed: float | None = None

    def metrics(self) -> dict[str, float]:
        """Values that are logged as curves; none depends on time measurements."""
        values = {
            "moved": self.moved,
            "objective_before": self.objective_before,
            "objective_after": self.objective_after,
            "objective_gain": self.objective_after - self.objective_before,
            "own_cosine": self.own_cosine,
            "classes_seen": self.classes_seen,
        }
        if self.prototypes_stayed is not None:
            values["prototypes_stayed"] = self.prototypes_stayed
        if self.diagnostics is not None:
            values |= self.diagnostics.metrics()
        return {name: float(value) for name, value in values.items()}


def all_reduce_statistic(statistic: ClassStatistic, group: dist.ProcessGroup | None = None) -> None:
    """Sum the statistics of all ranks in place; exact because they are integers."""
    if dist.is_initialized():
        dist.all_reduce(statistic.sums, group=group)
        dist.all_reduce(statistic.counts, group=group)


@dataclass(frozen=True)
class ReducedStatistics:
    """Reduced class statistics; the rows Q of the update are in `ClassStatistic.rows`.

    Attributes:
        own_cosine, classes_seen: as in `Matching`.
        means_cd, seen_c: mean unit feature and sum of shares of each class, float64.
        seconds: time of the reduction.
    """

    own_cosine: float
    classes_seen: int
    means_cd: Tensor
    seen_c: Tensor
    seconds: float

    def diagnostics(self) -> MatchDiagnostics:
        """Compute all diagnostics but the margin."""
        return compute_diagnostics(self.means_cd.cpu().numpy(), self.seen_c.cpu().numpy())


def match(
    statistic: ClassStatistic,
    prototypes_cd: Tensor,
    assignment_c: Tensor,
    momentum: float = 0.0,
    group: dist.ProcessGroup | None = None,
    solver: AssignmentSolver | QuadraticSolver | None = None,
    pooled: ClassStatistic | None = None,
) -> Matching:
    """Update the assignment; a collective that changes `assignment_c` and the statistic in place on every rank.

    Args:
        statistic: features of this rank since the last update; it is reset.
        prototypes_cd: unit rows [C, d].
        assignment_c: current σ, int64 [C].
        momentum: weight of the rows of the last update relative to the new ones.
        solver: `AssignmentSolver` maximizes Σ_c q_c · P[σ(c)] and reuses work of the last update, `QuadraticSolver`
            compares the similarities of classes with those of prototypes; default: a new `AssignmentSolver`.
        pooled: statistic of the backbone's features, which decides the assignment in place of `statistic`; it is reset.
            An `AssignmentSolver` gets its d principal directions.

    Raises:
        TrainingFailure: the assignment differs between ranks after the broadcast.
    """
    reduced = reduce_statistics(statistic, prototypes_cd, assignment_c, momentum, group)
    began = time.perf_counter()
    if pooled is not None:
        _reduce_rows(pooled, momentum, group)
    directions = (pooled or statistic).rows
    solver = solver or AssignmentSolver()
    problem = solution = None
    if is_main(group):
        rows = directions
        if pooled is not None and isinstance(solver, AssignmentSolver):
            rows = directions_of_seen(rows, prototypes_cd.shape[1])
        problem = rows.cpu().numpy(), prototypes_cd.double().cpu().numpy()
        solution = solver.solve(*problem, assignment_c.cpu().numpy(), rows.device)
    seconds = reduced.seconds + time.perf_counter() - began
    result = apply_assignment(statistic.rows, prototypes_cd, assignment_c, reduced, solution, group)
    diagnostics = None
    if problem is not None and solution is not None:
        diagnostics = reduced.diagnostics()
        if isinstance(solution, Solution):
            diagnostics = with_margin(diagnostics, *problem, solution.assignment)
        similar: Floats = directions.cpu().numpy()
        diagnostics = with_alignment(diagnostics, similar, problem[1], solution.assignment)
    return replace(result, seconds=seconds + result.seconds, diagnostics=diagnostics)


@torch.no_grad()
def reduce_statistics(
    statistic: ClassStatistic,
    prototypes_cd: Tensor,
    assignment_c: Tensor,
    momentum: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> ReducedStatistics:
    """All-reduce the statistic, compute the rows Q of the update in `statistic.rows` and reset it; a collective."""
    began = time.perf_counter()
    means, counts = _reduce_rows(statistic, momentum, group)
    points = prototypes_cd.double()
    own_cosine = ((means * points[assignment_c]).sum(dim=1) * counts).sum() / counts.sum().clamp(min=1e-300)
    seen = int((counts > 0).sum())
    return ReducedStatistics(float(own_cosine), seen, means, counts, time.perf_counter() - began)


@torch.no_grad()
def _reduce_rows(
    statistic: ClassStatistic, momentum: float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """All-reduce the statistic, compute its rows and reset it; returns its means and counts. A collective."""
    all_reduce_statistic(statistic, group)
    means, counts = statistic.means()
    statistic.rows.copy_(statistic.directions(momentum))
    statistic.reset()
    return means, counts


@torch.no_grad()
def apply_assignment(
    rows_cd: Tensor,
    prototypes_cd: Tensor,
    assignment_c: Tensor,
    reduced: ReducedStatistics,
    solution: Solution | QuadraticSolution | None,
    group: dist.ProcessGroup | None = None,
) -> Matching:
    """Broadcast a new assignment and copy it to `assignment_c` on every rank; a collective.

    Args:
        rows_cd: Q, float64 [C, d].
        solution: new assignment; rank 0 only.

    Returns:
        The result without diagnostics; `seconds` is the time of the broadcast.

    Raises:
        TrainingFailure: the assignment differs between ranks after the broadcast.
    """
    began = time.perf_counter()
    before = assignment_c.clone()
    if solution is not None:
        assignment_c.copy_(torch.from_numpy(solution.assignment))
    broadcast_verified(assignment_c, "assignment", group)
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
    """Whether this is rank 0 or the only process."""
    return not dist.is_initialized() or dist.get_rank(group) == 0


def broadcast_verified(tensor: Tensor, name: str, group: dist.ProcessGroup | None = None) -> None:
    """Broadcast a tensor from rank 0, if there is a process group, and compare it on all ranks."""
    if dist.is_initialized():
        dist.broadcast(tensor, group=group, group_src=0)
        verify_same(tensor, name, group)


def verify_same(tensor: Tensor, name: str, group: dist.ProcessGroup | None = None) -> None:
    """Check that the tensor is bit-identical on all ranks; a collective.

    Raises:
        TrainingFailure: names the ranks that differ from rank 0.
    """
    if not dist.is_initialized():
        return
    digest = hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).digest()[:8]
    local = torch.frombuffer(bytearray(digest), dtype=torch.int64).to(tensor.device)
    hashes = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(hashes, local, group=group)
    differing = [rank for rank, other in enumerate(hashes) if int(other) != int(hashes[0])]
    if differing:
        raise TrainingFailure(f"the {name} of rank(s) {differing} and of rank 0 differ")
