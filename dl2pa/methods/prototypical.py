"""Methods with fixed prototypes P and an assignment σ of labels to prototypes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from dl2pa.assignment import (
    AssignmentSolver,
    ClassStatistic,
    Matching,
    all_reduce_statistic,
    match,
    refit,
    solve_assignment,
)
from dl2pa.geometry import principal_directions
from dl2pa.methods.base import Method
from dl2pa.methods.losses import dot_regression, head_cross_entropy, squared_cosine
from dl2pa.methods.options import MethodOptions
from dl2pa.methods.scale import Scale
from dl2pa.methods.targets import Targets
from dl2pa.model.head import ClassifierHead


class PrototypeMethod(Method):
    """Method with class vectors W = P[σ], prototypes P and a permutation σ; any loss, σ static or dynamic.

    Squared cosine and dot regression use normalized features; gradients pass through the normalization.

    With `refit_cosine`, an assignment update also moves P (`dl2pa.assignment.refit`): toward the class means of the
    features, and at the end of a warm-up toward the vectors of the learned classifier.

    The cross-entropy is CE(s·(cos(f, W) − m·onehot(y)) + τ·log π, y) with fixed or learned scale s, margin m and
    adjustment τ to the class frequencies π; without `normalize` the scores are s·f·W.

    Args:
        prototypes_cd: unit rows [C, d].
        assignment_c: initial σ, int64 [C]; default: identity.
    """

    prototypes: Tensor
    assignment: Tensor
    weights: Tensor

    def __init__(
        self, prototypes_cd: Tensor, options: MethodOptions, assignment_c: Tensor | None = None
    ) -> None:
        super().__init__(len(prototypes_cd), prototypes_cd.shape[1], options)
        sigma = torch.arange(self.num_classes) if assignment_c is None else assignment_c
        self.register_buffer("prototypes", prototypes_cd.float())
        self.register_buffer("assignment", sigma.clone())
        self.register_buffer("weights", self.prototypes[sigma].clone(), persistent=False)
        softmax = options.loss == "cross_entropy"
        self.scale = Scale(options.scale if softmax else 1.0, softmax and options.learn_scale)
        self.statistic = ClassStatistic(self.num_classes, self.dim) if options.dynamic else None
        self.warmup: nn.Parameter | None = None
        if options.dynamic and options.schedule.warmup_epochs:
            start = torch.randn(self.num_classes, self.dim) / self.dim**0.5
            self.warmup = nn.Parameter(start)
        self._warming = False
        self._solver = AssignmentSolver()

    def loss(self, features: Tensor, targets: Targets) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self._warming:
                settings = 0.0, 0.0, self.adjustment, self.options.max_logits
                loss = head_cross_entropy(self.head(), features, targets, *settings)
                unused = self.scale.shift
            else:
                loss, unused = self._prototype_loss(features, targets), self.warmup
            # A zero gradient keeps an unused parameter in DDP's buckets: their layout determines the order of
            # summation, which must not depend on where a run resumed.
            return loss if unused is None else loss + 0.0 * unused.sum()

    def head(self) -> ClassifierHead:
        if self._warming and self.warmup is not None:
            return ClassifierHead(F.normalize(self.warmup, dim=1), self.options.warmup_scale)
        normalize = self.options.normalize or self.options.loss != "cross_entropy"
        return ClassifierHead(self.weights, self.scale(), normalize)

    def class_vectors(self) -> Tensor:
        if self._warming and self.warmup is not None:
            return F.normalize(self.warmup.detach(), dim=1)
        return self.weights

    def begin_epoch(self, epoch: int) -> None:
        self._warming = self.warmup is not None and epoch < self.options.schedule.warmup_epochs

    def observe(self, features: Tensor, targets: Targets) -> None:
        self.scale.clamp()
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
            self.statistic.reset()  # the first σ uses only features of the last warm-up epoch
        return self.options.dynamic and self.options.schedule.after_epoch(epoch)

    def rematch(self, group: dist.ProcessGroup | None = None) -> Matching | None:
        if self.statistic is None:
            return None
        parts = self.statistic, self.prototypes, self.assignment
        result = match(*parts, self.options.momentum, group, self._solver)
        if self.options.refit_cosine is not None:
            # The learned vectors take neighboring classes into account, the class means do not.
            directions = self.class_vectors() if self._warming else self.statistic.rows
            stayed = refit(self.prototypes, self.assignment, directions, self.options.refit_cosine, group)
            result = replace(result, prototypes_stayed=stayed)
        self.refresh()
        return result

    def refresh(self) -> None:
        """Recompute W after a change of P or σ."""
        self.weights.copy_(self.prototypes[self.assignment])

    def gather_state(self) -> None:
        if self.statistic is not None:
            all_reduce_statistic(self.statistic)

    def keep_on_rank_zero(self) -> None:
        if self.statistic is not None and dist.is_initialized() and dist.get_rank() != 0:
            self.statistic.reset()

    def _prototype_loss(self, features: Tensor, targets: Targets) -> Tensor:
        if self.options.loss == "squared_cosine":
            return squared_cosine(features, self.weights, targets)
        if self.options.loss == "dot_regression":
            # As the paper's head. Otherwise the gradient is along w only and increases the norm of the features.
            return dot_regression(F.normalize(features, dim=1), self.weights, targets)
        margin = self.options.margin * self.scale() if self.options.margin else 0.0
        settings = self.options.label_smoothing, margin, self.adjustment, self.options.max_logits
        return head_cross_entropy(self.head(), features, targets, *settings)


def assignment_from_vectors(prototypes_cd: Tensor, class_vectors_ck: Tensor) -> Tensor:
    """Return the initial σ from class vectors [C, k], for example word vectors: similar classes get similar prototypes.

    The vectors are reduced to d dimensions (`principal_directions`) and assigned optimally.
    """
    rows = principal_directions(class_vectors_ck, prototypes_cd.shape[1])
    return torch.from_numpy(solve_assignment(rows.numpy(), prototypes_cd.double().numpy()))
