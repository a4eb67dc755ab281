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
    set_directions,
    solve_assignment,
)
from dl2pa.geometry import directions_of_seen, principal_directions
from dl2pa.methods.base import Method
from dl2pa.methods.losses import dot_regression, global_counts, head_cross_entropy, ntce, squared_cosine
from dl2pa.methods.negatives import nearest_classes, sampled_cross_entropy
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
    features, and at the end of a warm-up toward the vectors of the learned classifier; with `pooled_dim`, toward the d
    principal directions of the class means of the backbone's features.

    From `release_epoch` on, gradients train the class vectors, starting from W; without it they never move them.

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
        softmax = options.loss in ("cross_entropy", "ntce")
        self.scale = Scale(options.scale if softmax else 1.0, softmax and options.learn_scale)
        self.statistic = ClassStatistic(self.num_classes, self.dim) if options.dynamic else None
        self.warmup: nn.Parameter | None = None
        if options.dynamic and options.schedule.warmup_epochs:
            start = torch.randn(self.num_classes, self.dim) / self.dim**0.5
            self.warmup = nn.Parameter(start)
        pooled = options.dynamic and options.pooled_dim is not None
        self.pooled = ClassStatistic(self.num_classes, options.pooled_dim or 0) if pooled else None
        # Equals W until it is released.
        self.learned = None if options.release_epoch is None else nn.Parameter(self.weights.clone())
        self._warming = self._released = False
        self._find_neighbors()
        self._solver = QuadraticSolver() if options.quadratic else AssignmentSolver()

    def loss(self, features: Tensor, targets: Targets) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self._warming:
                loss, unused = self._warmup_loss(features, targets), [self.scale.shift, self.learned]
            else:
                loss = self._prototype_loss(features, targets)
                unused = [self.warmup, None if self._released else self.learned]
            # A zero gradient keeps an unused parameter in DDP's buckets: their layout determines the order of
            # summation, which must not depend on where a run resumed.
            for parameter in unused:
                loss = loss if parameter is None else loss + 0.0 * parameter.sum()
            return loss

    def head(self) -> ClassifierHead:
        if self._warming and self.warmup is not None:
            return ClassifierHead(F.normalize(self.warmup, dim=1), self.options.warmup_scale)
        return ClassifierHead(self._vectors(), self.scale(), self._normalizes)

    def class_vectors(self) -> Tensor:
        if self._warming and self.warmup is not None:
            return F.normalize(self.warmup.detach(), dim=1)
        return F.normalize(self._vectors().detach(), dim=1) if self._released else self.weights

    def begin_epoch(self, epoch: int) -> None:
        self._warming = self.warmup is not None and epoch < self.options.schedule.warmup_epochs
        release = self.options.release_epoch
        self._released = release is not None and epoch >= release

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
        self.hold_vectors()
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
        if self.options.rotate or self.options.refit_cosine is not None:
            result = replace(result, prototypes_stayed=self._move_prototypes(self.statistic, group))
        self.refresh()
        self.hold_vectors()
        return result

    def refresh(self) -> None:
        """Recompute W and the neighbors after a change of P or σ."""
        self.weights.copy_(self.prototypes[self.assignment])
        self._find_neighbors()

    def gather_state(self) -> None:
        for statistic in self._statistics():
            all_reduce_statistic(statistic)

    def keep_on_rank_zero(self) -> None:
        if dist.is_initialized() and dist.get_rank() != 0:
            for statistic in self._statistics():
                statistic.reset()

    def _move_prototypes(self, statistic: ClassStatistic, group: dist.ProcessGroup | None) -> float:
        """Refit and rotate the prototypes; returns the mean cosine between the old and the new ones. A collective."""
        parts, cosine = (self.prototypes, self.assignment), self.options.refit_cosine
        before = self.prototypes.clone()
        if cosine is not None and self.pooled is not None:
            directions = directions_of_seen(self.pooled.rows, self.dim)
            if cosine < 1.0:
                rotate(*parts, directions, group)  # the principal directions have a rotation of their own
                refit(*parts, directions, cosine, group)
            else:
                set_directions(*parts, directions, group)
        elif cosine is not None:
            # The learned vectors take neighboring classes into account, the class means do not.
            return refit(*parts, self.class_vectors() if self._warming else statistic.rows, cosine, group)
        if self.options.rotate:
            rotate(*parts, statistic.rows, group)
        return float((before.double() * self.prototypes.double()).sum(dim=1).mean())

    @property
    def _normalizes(self) -> bool:
        return self.options.normalize or self.options.loss != "cross_entropy"

    def _vectors(self) -> Tensor:
        """W, or the vectors that are trained from it, unit rows if cosines are used; [C, d]."""
        if not self._released or self.learned is None:
            return self.weights
        return F.normalize(self.learned, dim=1) if self._normalizes else self.learned

    @torch.no_grad()
    def hold_vectors(self) -> None:
        if self.learned is not None and not self._released:
            self.learned.copy_(self.weights)

    def _find_neighbors(self) -> None:
        if self.options.neighbors:
            self.neighbors = nearest_classes(self.weights, self.options.neighbors)

    def _statistics(self) -> list[ClassStatistic]:
        return [statistic for statistic in (self.statistic, self.pooled) if statistic is not None]

    def _prototype_loss(self, features: Tensor, targets: Targets) -> Tensor:
        if self.options.loss == "squared_cosine":
            return squared_cosine(features, self._vectors(), targets)
        if self.options.loss == "ntce":
            return ntce(self.head(), features, targets)
        if self.options.loss == "dot_regression":
            # As the paper's head. Otherwise the gradient is along w only and increases the norm of the features.
            return dot_regression(F.normalize(features, dim=1), self._vectors(), targets)
        margin = self.options.margin * self.scale() if self.options.margin else 0.0
        return self.cross_entropy(features, targets, self.options.label_smoothing, margin)

    def _warmup_loss(self, features: Tensor, targets: Targets) -> Tensor:
        """Cross-entropy of the learned classifier: over random classes if the loss uses them, otherwise over all."""
        head, adjustment, gce_q = self.head(), self.adjustment, self.options.gce_q
        if self.options.random_negatives:
            return sampled_cross_entropy(head, features, targets, None, 0.0, adjustment, gce_q)
        limit = self.options.max_logits
        return head_cross_entropy(head, features, targets, 0.0, 0.0, adjustment, limit, gce_q)


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
