from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dl2pa.errors import TrainingFailure
from dl2pa.training.evaluate import Evaluation, Predictions, evaluate
from pipelines.batch import Batch
from pipelines.longtail import Group


class Prepared:
    """A pipeline whose images are the logits themselves; padding repeats sample 0, as loaders do."""

    def __init__(self, logits: Tensor, targets: Tensor, batch: int, lost: int = 0) -> None:
        self.logits, self.targets, self.batch, self.lost = logits, targets, batch, lost
        self.num_samples = len(targets)
        self.steps_per_epoch = -(-len(targets) // batch) + 1

    def start(self, epoch: int, step: int = 0) -> None:
        pass

    def bad_images(self) -> list[str]:
        return []

    def close(self) -> None:
        pass

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.steps_per_epoch):
            index = torch.arange(self.num_samples - self.lost)[step * self.batch :][: self.batch]
            valid = len(index)
            index = torch.cat([index, torch.zeros(self.batch - valid, dtype=torch.int64)])
            yield Batch(self.logits[index], self.targets[index], index, valid)


def draw(samples: int, classes: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples * classes)
    targets = torch.randint(0, classes, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator)
    logits[torch.arange(samples), targets] += 1.0
    return scale * logits, targets


def reference(logits: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """top-1, top-5 and ECE from the definitions, in float64, sample by sample."""
    z, y = logits.double().numpy(), targets.numpy()
    ranks = np.array([int((row > row[label]).sum()) for row, label in zip(z, y, strict=True)])
    p = np.exp(z - z.max(1, keepdims=True))
    confidence = (p / p.sum(1, keepdims=True)).max(1)
    error = 0.0
    edges = np.linspace(0, 1, 16)
    for low, high in itertools.pairwise(edges):
        inside = (confidence >= low) & ((confidence < high) | (high == 1))
        if inside.any():
            error += inside.mean() * abs((ranks[inside] == 0).mean() - confidence[inside].mean())
    return 100 * (ranks == 0).mean(), 100 * (ranks < 5).mean(), 100 * error


def run(logits: Tensor, targets: Tensor, batch: int) -> Evaluation:
    result = evaluate(lambda x: x, Prepared(logits, targets, batch), logits.shape[1])
    assert result is not None
    return result


@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (7, 3), (103, 10), (400, 40)])
@pytest.mark.parametrize("batch", [1, 8, 64, 500])
def test_results_equal_the_definitions_for_any_batch_size(samples: int, classes: int, batch: int) -> None:
    logits, targets = draw(samples, classes)
    result = run(logits, targets, batch)
    top1, top5, ece = reference(logits, targets)
    assert result.num_validated == samples
    assert result.top1 == pytest.approx(top1)
    assert result.top5 == pytest.approx(top5)
    assert result.ece == pytest.approx(ece, abs=1e-4)
    assert result.class_total == np.bincount(targets.numpy(), minlength=classes).tolist()
    hits = targets[logits.argmax(1) == targets].numpy()
    assert result.class_correct == np.bincount(hits, minlength=classes).tolist()


def test_the_batch_size_does_not_change_the_result() -> None:
    logits, targets = draw(103, 10)
    assert {str(run(logits, targets, batch)) for batch in (1, 7, 103, 200)} == {str(run(logits, targets, 16))}


def test_top5_with_fewer_than_five_classes_is_100() -> None:
    logits, targets = draw(50, 3)
    assert run(logits, targets, 8).top5 == 100.0


def test_confident_wrong_predictions_have_an_ece_of_100() -> None:
    logits = torch.tensor([[100.0, 0.0]]).repeat(4, 1)
    assert run(logits, torch.ones(4, dtype=torch.int64), 3).ece == pytest.approx(100.0)
    assert run(logits, torch.zeros(4, dtype=torch.int64), 3).ece == pytest.approx(0.0, abs=1e-6)


def test_half_precision_logits_are_evaluated_in_float32() -> None:
    logits, targets = draw(200, 10)
    half = logits.bfloat16()
    assert run(half, targets, 32) == run(half.float(), targets, 32)


def test_missing_images_are_an_error() -> None:
    logits, targets = draw(20, 3)
    with pytest.raises(TrainingFailure, match="18 of 20"):
        evaluate(lambda x: x, Prepared(logits, targets, 4, lost=2), 3)


def test_group_accuracy_is_the_mean_over_its_classes() -> None:
    logits, targets = draw(400, 40)
    targets[:100] = 3  # an imbalanced validation set: class 3 has the same weight as the others of its group
    groups: list[Group] = ["head"] * 10 + ["medium"] * 20 + ["tail"] * 10
    result = evaluate(lambda x: x, Prepared(logits, targets, 32), 40, groups=groups)
    assert result is not None
    rates = np.array(result.class_correct) / np.array(result.class_total)
    assert result.top1_by_group == {
        "top1_head": pytest.approx(100 * rates[:10].mean()),
        "top1_medium": pytest.approx(100 * rates[10:30].mean()),
        "top1_tail": pytest.approx(100 * rates[30:].mean()),
    }
    assert list(result.metrics()) == [
        *("top1", "top5", "ece", "num_validated"),
        *("top1_head", "top1_medium", "top1_tail"),
    ]
    assert result.record() == {
        **result.metrics(),
        "class_correct": result.class_correct,
        "class_total": result.class_total,
    }


def test_without_a_long_tail_there_are_no_groups() -> None:
    logits, targets = draw(50, 4)
    assert list(run(logits, targets, 8).metrics()) == ["top1", "top5", "ece", "num_validated"]


def test_a_group_without_validation_images_is_omitted() -> None:
    logits, targets = draw(50, 3)
    targets = targets.clamp(max=1)
    result = evaluate(lambda x: x, Prepared(logits, targets, 8), 3, groups=["head", "medium", "tail"])
    assert result is not None
    assert list(result.top1_by_group) == ["top1_head", "top1_medium"]


def test_a_stop_ends_the_evaluation_without_a_result() -> None:
    logits, targets = draw(20, 3)
    answers = iter([False, False, True])
    seen: list[int] = []
    result = evaluate(lambda x: x, Prepared(logits, targets, 4), 3, lambda: next(answers), seen.append)
    assert result is None
    assert seen == [1, 2]


def test_predictions_belong_to_their_images(tmp_path: Path) -> None:
    logits, targets = draw(103, 10)
    result = run(logits, targets, 16)
    result.predictions.save(tmp_path / "predictions.npz")
    found = Predictions.load(tmp_path / "predictions.npz")
    share = logits.double().softmax(1)
    assert found.targets.tolist() == targets.tolist()
    assert found.predicted.tolist() == logits.argmax(1).tolist()
    assert found.confidence == pytest.approx(share.amax(1).numpy(), abs=1e-6)
    ranks = (logits > logits[torch.arange(103), targets][:, None]).sum(1)
    assert found.in_top5.tolist() == (ranks < 5).tolist()
    assert [f.name for f in tmp_path.iterdir()] == ["predictions.npz"]


def test_an_image_counted_twice_is_an_error() -> None:
    logits, targets = draw(20, 3)

    class Doubled(Prepared):
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                batch.indices[batch.indices == 7] = 6
                yield batch

    with pytest.raises(TrainingFailure, match="19 of 20"):
        evaluate(lambda x: x, Doubled(logits, targets, 4), 3)


@pytest.mark.parametrize("max_logits", [1, 10, 45, 10**9])
def test_max_logits_does_not_change_the_result(max_logits: int) -> None:
    logits, targets = draw(103, 10)
    scored: list[int] = []

    def score(images: Tensor) -> Tensor:
        scored.append(len(images))
        return images

    result = evaluate(score, Prepared(logits, targets, 16), 10, max_logits=max_logits)
    assert result is not None
    assert result.record() == run(logits, targets, 16).record()
    assert max(scored) == min(16, max(1, max_logits // 10))
