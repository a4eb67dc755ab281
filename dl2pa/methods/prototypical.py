"""What the methods with fixed prototypes share: P, σ, the losses over W = P[σ], and the matching of both."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from dl2pa.assignment import (
    ClassStatistic,
    Matching,
    MatchSchedule,
    match,
    reduce_statistic,
    solve_assignment,
)
from dl2pa.methods.base import Method, cosines
from dl2pa.methods.losses import cross_entropy, dot_regression, squared_cosine
from dl2pa.methods.targets import Targets


@dataclass(frozen=True)
class PrototypeOptions:
    """How a prototype method trains and matches.

    Args:
        loss: squared_cosine, dot_regression or cross_entropy.
        dynamic: match labels to prototypes anew, by `schedule`.
        scale: of the cosines in cross_entropy.
        warmup_scale: of the learned classifier's cosines during the schedule's warm-up.
        momentum: weight of the previous statistic at a matching.
    """

    loss: str = "squared_cosine"
    dynamic: bool = True
    scale: float = 1 / 0.07
    label_smoothing: float = 0.0
    warmup_scale: float = 14.0
    momentum: float = 0.0
    schedule: MatchSchedule = field(default_factory=MatchSchedule)


class PrototypeMethod(Method):
    """Class vectors W = P[σ] from fixed prototypes P and a permutation σ.

    Args:
        prototypes_cd: unit rows [C, d].
        assignment_c: first σ, int64 [C]; default: label c stands at prototype c.
    """

    prototypes: Tensor
    assignment: Tensor
    weights: Tensor

    def __init__(
        self, prototypes_cd: Tensor, options: PrototypeOptions, assignment_c: Tensor | None = None
    ) -> None:
        super().__init__(len(prototypes_cd), prototypes_cd.shape[1])
        sigma = torch.arange(self.num_classes) if assignment_c is None else assignment_c
        self.options = options
        self.register_buffer("prototypes", prototypes_cd.float())
        self.register_buffer("assignment", sigma.clone())
        self.register_buffer("weights", self.prototypes[sigma].clone(), persistent=False)
        self.statistic = ClassStatistic(self.num_classes, self.dim) if options.dynamic else None
        self.warmup: nn.Parameter | None = None
        if options.dynamic and options.schedule.warmup_epochs:
            start = torch.randn(self.num_classes, self.dim) / self.dim**0.5
            self.warmup = nn.Parameter(start)
        self._warming = False

    def loss(self, features: Tensor, targets: Targets) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self.warmup is None:
                return self._prototype_loss(features, targets)
            if self._warming:
                return cross_entropy(self._warmup_logits(features), targets)
            # A zero gradient keeps the learned classifier in DDP's buckets: their layout decides the order of
            # summation, which must not depend on where a run resumed.
            return self._prototype_loss(features, targets) + 0.0 * self.warmup.sum()

    def logits(self, features: Tensor) -> Tensor:
        if self._warming:
            return self._warmup_logits(features)
        return self.scale() * cosines(features, self.weights)

    def scale(self) -> float:
        if self._warming:
            return self.options.warmup_scale
        return self.options.scale if self.options.loss == "cross_entropy" else 1.0

    def class_vectors(self) -> Tensor:
        if self._warming and self.warmup is not None:
            return F.normalize(self.warmup.detach(), dim=1)
        return self.weights

    def begin_epoch(self, epoch: int) -> None:
        self._warming = self.warmup is not None and epoch < self.options.schedule.warmup_epochs

    def observe(self, features: Tensor, targets: Targets) -> None:
        if self.statistic is None:
            return
        features = features.detach()
        self.statistic.add(features, targets.first, targets.share)
        if targets.second is not None and targets.share is not None:
            self.statistic.add(features, targets.second, 1.0 - targets.share)

    def due_after_step(self, epoch: int, global_step: int) -> bool:
        return self.options.dynamic and self.options.schedule.after_step(epoch, global_step)

    def due_after_epoch(self, epoch: int) -> bool:
        if self.statistic is not None and epoch < self.options.schedule.warmup_epochs - 1:
            self.statistic.reset()  # features of an epoch that still moved a lot say little about the first σ
        return self.options.dynamic and self.options.schedule.after_epoch(epoch)

    def rematch(self, group: dist.ProcessGroup | None = None) -> Matching | None:
        if self.statistic is None:
            return None
        result = match(self.statistic, self.prototypes, self.assignment, self.options.momentum, group)
        self.refresh()
        return result

    def refresh(self) -> None:
        """Recompute W after P or σ changed (a load, a matching)."""
        self.weights.copy_(self.prototypes[self.assignment])

    def gather_state(self) -> None:
        if self.statistic is not None:
            reduce_statistic(self.statistic)

    def keep_on_rank_zero(self) -> None:
        if self.statistic is not None and dist.is_initialized() and dist.get_rank() != 0:
            self.statistic.reset()

    def unsynchronised(self) -> set[str]:
        return {name for name, _ in self.named_buffers()}

    def _prototype_loss(self, features: Tensor, targets: Targets) -> Tensor:
        if self.options.loss == "squared_cosine":
            return squared_cosine(features, self.weights, targets)
        if self.options.loss == "dot_regression":
            return dot_regression(features, self.weights, targets)
        return cross_entropy(
            self.options.scale * cosines(features, self.weights), targets, self.options.label_smoothing
        )

    def _warmup_logits(self, features: Tensor) -> Tensor:
        assert self.warmup is not None, "warming up needs the learned classifier"
        return self.options.warmup_scale * cosines(features, F.normalize(self.warmup, dim=1))


def assignment_from_vectors(prototypes_cd: Tensor, class_vectors_ck: Tensor) -> Tensor:
    """First σ from class vectors [C, k] (word vectors, say): classes alike stand at prototypes alike.

    The vectors are centred, reduced to d by PCA (or padded with zeros), normalised and matched exactly.
    """
    centred = class_vectors_ck.double() - class_vectors_ck.double().mean(dim=0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    dim = prototypes_cd.shape[1]
    reduced = F.pad((left * values)[:, :dim], (0, max(0, dim - len(values))))
    rows = F.normalize(reduced, dim=1).numpy()
    return torch.from_numpy(solve_assignment(rows, prototypes_cd.double().numpy()))
