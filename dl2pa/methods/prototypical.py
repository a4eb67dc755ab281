"""Methods with fixed prototypes P and an assignment σ of labels to prototypes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from dl2pa.assignment import (
    AssignmentSolver,
    ClassStatistic,
    Matching,
    QuadraticSolver,
    all_reduce_statistic,
    match,
    refit,
    rotate,
    solve_assignment,
)
from dl2pa.geometry import principal_directions
from dl2pa.methods.base import Method
from dl2pa.methods.losses import dot_regression, global_counts, head_cross_entropy, squared_cosine
from dl2pa.methods.options import MethodOptions
from dl2pa.methods.scale import Scale
from dl2pa.methods.targets import Targets
from dl2pa.model.head import ClassifierHead


class PrototypeMethod(Method):
    """Method with class vectors W = P[σ], prototypes P and a permutation σ; any loss, σ static or dynamic.

    Squared cosine and dot regression use normalized features; gradients pass through the normalization.

    With `pooled_dim`, the class means of the backbone's features decide the assignment, with `quadratic` by their
    similarities, and with `rotate` an update rotates P to the class means of the embedding.

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
        pooled = options.dynamic and options.pooled_dim is not None
        self.pooled = ClassStatistic(self.num_classes, options.pooled_dim or 0) if pooled else None
        self._warming = False
        self._solver = QuadraticSolver() if options.quadratic else AssignmentSolver()

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

    def count_batch(self, targets: Targets) -> Targets:
        if self.options.loss != "dot_regression":
            return targets
        second = targets.second
        return targets._replace(
            first_counts=global_counts(targets.first, self.num_classes),
            second_counts=None if second is None else global_counts(second, self.num_classes),
        )

    @property
    def uses_pooled(self) -> bool:
        return self.pooled is not None

    def observe(self, features: Tensor, targets: Targets, pooled: Tensor | None = None) -> None:
        self.scale.clamp()
        for statistic, values in ((self.statistic, features), (self.pooled, pooled)):
            if statistic is not None and values is not None:
                statistic.add(values.detach(), targets.first, targets.share)
                if targets.second is not None and targets.share is not None:
                    statistic.add(values.detach(), targets.second, 1.0 - targets.share)

    def due_after_step(self, epoch: int, global_step: int) -> bool:
        return self.options.dynamic and self.options.schedule.after_step(epoch, global_step)

    def due_after_epoch(self, epoch: int) -> bool:
        if epoch < self.options.schedule.warmup_epochs - 1:
            for statistic in self._statistics():
                statistic.reset()  # the first σ uses only features of the last warm-up epoch
        return self.options.dynamic and self.options.schedule.after_epoch(epoch)

    def rematch(self, group: dist.ProcessGroup | None = None) -> Matching | None:
        if self.statistic is None:
            return None
        parts = self.statistic, self.prototypes, self.assignment
        result = match(*parts, self.options.momentum, group, self._solver, self.pooled)
        if self.options.rotate:
            stayed = rotate(self.prototypes, self.assignment, self.statistic.rows, group)
            result = replace(result, prototypes_stayed=stayed)
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
        for statistic in self._statistics():
            all_reduce_statistic(statistic)

    def keep_on_rank_zero(self) -> None:
        if dist.is_initialized() and dist.get_rank() != 0:
            for statistic in self._statistics():
                statistic.reset()

    def _statistics(self) -> list[ClassStatistic]:
        return [statistic for statistic in (self.statistic, self.pooled) if statistic is not None]

    def _prototype_loss(self, features: Tensor, targets: Targets) -> Tensor:
        if self.options.loss == "squared_cosine":
            return squared_cosine(features, self.weights, targets)
        if self.options.loss == "dot_regression":
            # As the paper's head. Otherwise the gradient is along w only and increases the norm of the features.
            return dot_regression(F.normalize(features, dim=1), self.weights, targets)
        margin = self.options.margin * self.scale() if self.options.margin else 0.0
        settings = self.options.label_smoothing, margin, self.adjustment, self.options.max_logits
        return head_cross_entropy(self.head(), features, targets, *settings)


def assignment_from_vectors(
    prototypes_cd: Tensor, class_vectors_ck: Tensor, quadratic: bool = False
) -> Tensor:
    """Return the initial σ from class vectors [C, k], for example word vectors: similar classes get similar prototypes.

    Args:
        quadratic: compare the similarities of the vectors with those of the prototypes; default: reduce the vectors to
            d dimensions (`principal_directions`) and assign these optimally.
    """
    if quadratic:
        vectors, points = class_vectors_ck.double().numpy(), prototypes_cd.double().numpy()
        current = np.arange(len(points))
        return torch.from_numpy(QuadraticSolver().solve(vectors, points, current).assignment)
    rows = principal_directions(class_vectors_ck, prototypes_cd.shape[1])
    return torch.from_numpy(solve_assignment(rows.numpy(), prototypes_cd.double().numpy()))
