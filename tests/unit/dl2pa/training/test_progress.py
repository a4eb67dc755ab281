from __future__ import annotations

from typing import Any

import pytest

from dl2pa.training.progress import Progress


def entry(step: int, top1: float) -> dict[str, Any]:
    return {"epoch": step, "step": step, "top1": top1}


def test_the_first_of_equal_best_validations_is_the_best() -> None:
    progress = Progress()
    assert [progress.record(entry(s, t)) for s, t in ((1, 5.0), (2, 4.0), (3, 5.0), (4, 6.0))] == [
        True,
        False,
        False,
        True,
    ]
    assert progress.best == {"top1": 6.0, "step": 4}


def test_a_repeated_validation_replaces_the_first() -> None:
    progress = Progress()
    for step, top1 in ((1, 5.0), (2, 6.0), (2, 6.0)):
        progress.record(entry(step, top1))
    assert [h["step"] for h in progress.history] == [1, 2]


@pytest.mark.parametrize(
    ("accuracies", "patience", "first_epoch", "exhausted"),
    [
        ([5.0, 4.0, 4.5], 2, 0, True),
        ([5.0, 4.0, 4.5], 3, 0, False),
        ([5.0, 4.0, 4.5], None, 0, False),
        ([5.0, 4.0, 5.0], 2, 0, True),
        ([5.0, 4.0, 5.1], 2, 0, False),
        ([5.0, 4.0, 4.5, 4.2], 2, 2, False),
        ([5.0, 4.0, 4.5, 4.2, 4.4], 2, 2, True),
        ([], 1, 0, False),
    ],
)
def test_patience_counts_the_epochs_after_the_best_validation(
    accuracies: list[float], patience: int | None, first_epoch: int, exhausted: bool
) -> None:
    progress = Progress(global_step=len(accuracies))
    for number, top1 in enumerate(accuracies, 1):
        progress.record(entry(number, top1))
    assert Progress(**progress.as_dict()).is_exhausted(patience, first_epoch) == exhausted


def test_patience_ends_a_run_at_a_validation_only() -> None:
    """A run that is resumed with less patience first finishes its epoch."""
    progress = Progress(global_step=9, history=[entry(1, 5.0), entry(8, 4.0)])
    assert not progress.is_exhausted(2, 0)
    progress.global_step = 8
    assert progress.is_exhausted(2, 0)


def test_progress_survives_a_round_trip() -> None:
    progress = Progress(epoch=2, step=3, global_step=23, phase="evaluate", labels_moved=[9, 0])
    progress.record(entry(20, 5.0))
    assert Progress(**progress.as_dict()) == progress


@pytest.mark.parametrize(
    ("at", "max_steps", "over"),
    [
        (Progress(epoch=4), None, False),
        (Progress(epoch=5), None, True),
        (Progress(epoch=5, phase="evaluate"), None, False),
        (Progress(epoch=1, step=2, global_step=12), 12, False),
        (Progress(epoch=1, step=2, global_step=12, history=[entry(12, 1.0)]), 12, True),
        (Progress(epoch=1, step=2, global_step=12, history=[entry(10, 1.0)]), 12, False),
        (Progress(epoch=1, step=2, global_step=12, history=[entry(12, 1.0)]), 13, False),
    ],
)
def test_a_run_is_over_once_its_last_step_is_validated(
    at: Progress, max_steps: int | None, over: bool
) -> None:
    assert at.over(5, max_steps) == over
