"""Exact evaluation over all ranks: integer counts, padding masked, every image once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch import distributed as dist

from dl2pa.errors import TrainingFailure
from pipelines.batch import Batch, Pipeline
from pipelines.longtail import GROUPS, Group

_BINS = 15
_ONE = 2.0**32

Scorer = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] to logits [B, C]."""


@dataclass(frozen=True)
class Evaluation:
    """Results over the whole set; accuracies and calibration error in per cent.

    Attributes:
        top1, top5: accuracy (top5 over min(5, C) guesses).
        ece: expected calibration error, 15 equal-width bins (Naeini et al., AAAI 2015).
        num_validated: images counted.
        class_correct, class_total: top-1 hits and images of each class.
        top1_by_group: ``top1_head``, ``top1_medium`` and ``top1_tail`` where the training data is long-tailed:
            the mean of the classes' accuracies, as the field reports it, so that on an uneven validation set
            every class weighs the same.
    """

    top1: float
    top5: float
    ece: float
    num_validated: int
    class_correct: list[int]
    class_total: list[int]
    top1_by_group: dict[str, float] = field(default_factory=dict[str, float])

    def metrics(self) -> dict[str, float | int]:
        """What is reported by name: everything but the counts of each class."""
        overall = {"top1": self.top1, "top5": self.top5, "ece": self.ece}
        return {**overall, "num_validated": self.num_validated, **self.top1_by_group}

    def record(self) -> dict[str, object]:
        """Everything, as it is written to validation.json."""
        return {**self.metrics(), "class_correct": self.class_correct, "class_total": self.class_total}


class _Counts:
    """Integer counters on the device."""

    def __init__(self, num_classes: int, device: torch.device, groups: Sequence[Group] | None = None) -> None:
        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        self.groups = groups
        self.top5 = zeros(1)
        self.class_correct, self.class_total = zeros(num_classes), zeros(num_classes)
        self.bin_total, self.bin_correct, self.bin_confidence = zeros(_BINS), zeros(_BINS), zeros(_BINS)

    def add(self, logits_bc: Tensor, batch: Batch) -> None:
        logits = logits_bc.float()
        real = (torch.arange(len(batch.targets), device=logits.device) < batch.valid).long()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = (best == batch.targets[:, None]).long() * real[:, None]
        confidence = logits.softmax(dim=1).amax(dim=1)
        bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
        self.top5 += hits.sum()
        self.class_correct.index_add_(0, batch.targets, hits[:, 0])
        self.class_total.index_add_(0, batch.targets, real)
        self.bin_total.index_add_(0, bins, real)
        self.bin_correct.index_add_(0, bins, hits[:, 0])
        self.bin_confidence.index_add_(0, bins, (confidence * _ONE).round().long() * real)

    def result(self) -> Evaluation:
        """Sum over ranks, exactly; a collective."""
        parts = [
            self.top5,
            self.class_correct,
            self.class_total,
            self.bin_total,
            self.bin_correct,
            self.bin_confidence,
        ]
        flat = torch.cat(parts)
        if dist.is_initialized():
            dist.all_reduce(flat)
        top5, correct, total, bin_total, bin_correct, bin_confidence = flat.cpu().split(
            [len(p) for p in parts]
        )
        count = int(total.sum())
        gap = (bin_correct.double() - bin_confidence.double() / _ONE).abs().sum()
        assert int(bin_total.sum()) == count, "every image falls into one bin"
        return Evaluation(
            top1=100.0 * int(correct.sum()) / count,
            top5=100.0 * int(top5) / count,
            ece=100.0 * float(gap) / count,
            num_validated=count,
            class_correct=correct.tolist(),
            class_total=total.tolist(),
            top1_by_group=_group_accuracies(correct.tolist(), total.tolist(), self.groups),
        )


def _group_accuracies(
    correct: list[int], total: list[int], groups: Sequence[Group] | None
) -> dict[str, float]:
    """Mean accuracy over the classes of each group that has validation images."""
    found: dict[str, float] = {}
    for group in GROUPS if groups is not None else ():
        counted = zip(correct, total, groups or (), strict=True)
        rates = [hits / images for hits, images, of in counted if of == group and images]
        if rates:
            found[f"top1_{group}"] = 100.0 * sum(rates) / len(rates)
    return found


@torch.inference_mode()
def evaluate(
    score: Scorer,
    pipeline: Pipeline,
    num_classes: int,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda step: None,
    groups: Sequence[Group] | None = None,
) -> Evaluation | None:
    """Run the whole set through `score`; None where a stop was agreed on the way. A collective.

    Args:
        groups: head, medium or tail for each class, for their accuracies.

    Raises:
        TrainingFailure: the images counted are not the images in the set.
    """
    counts = _Counts(num_classes, device, groups)
    pipeline.start(0)
    for step, batch in enumerate(pipeline):
        if should_stop():
            return None
        counts.add(score(batch.images), batch)
        progress(step + 1)
    result = counts.result()
    if result.num_validated != pipeline.num_samples:
        raise TrainingFailure(f"validated {result.num_validated} of {pipeline.num_samples} images")
    return result
