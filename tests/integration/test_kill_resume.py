"""A run that is interrupted and resumed by the same command is bit-identical to an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from support.runs import (
    IN_MEMORY,
    STOPPED,
    Started,
    Training,
    assert_identical,
    outcome_of,
    processes_of,
)

pytestmark = pytest.mark.xdist_group("runs")
FAILED = 1
STEPS_PER_EPOCH = 29  # 1,438 images, batches of 48
STEPS = 3 * STEPS_PER_EPOCH
_STOPPING = ("term launcher", "usr2 launcher", "term group", "term one rank")
Undisturbed = Callable[..., Training]


def interrupt_once(how: str, started: Started, run: Path, rng: random.Random) -> set[int]:
    """Send the signal that `how` names; returns the permitted exit codes of the attempt."""
    if how == "term launcher":
        os.kill(started.pid, signal.SIGTERM)
    elif how == "usr2 launcher":
        os.kill(started.pid, signal.SIGUSR2)
    elif how == "term group":
        started.signal_group(signal.SIGTERM)
    elif how == "kill group":
        started.signal_group(signal.SIGKILL)
        return {-signal.SIGKILL}
    else:
        number, _, kind = how.partition(" one ")
        members = [p for p in processes_of(run) if p.kind == kind]
        assert members, f"no {kind} process"
        os.kill(rng.choice(members).pid, signal.SIGTERM if number == "term" else signal.SIGKILL)
        return {STOPPED} if how in _STOPPING else {FAILED}
    return {STOPPED}


def interrupt(training: Training, ways: list[str], steps: list[int], seed: int) -> None:
    """Start the run, interrupt it at each of the steps, then finish it."""
    rng = random.Random(seed)
    for way, step in zip(ways, steps, strict=True):
        attempt = training.status.get("attempt", 0)
        started = training.start()
        training.wait_for_step(started, step, attempt)
        expected = interrupt_once(way, started, training.run, rng)
        code = started.wait()
        assert code in expected, f"{way} at step {step}: exit code {code}\n{started.error}"
        training.assert_gone()
        status = training.status
        assert status["attempt"] == attempt + 1
        if code == STOPPED:
            assert status["state"] == "stopped"
            assert (training.run / "checkpoints" / f"step-{status['step']:09d}" / "COMPLETE").exists()
            assert status["step"] < status["total_steps"], "a stop does not wait for the end"
            result = started.completed().result
            assert result == {"stopped": True, "step": status["step"], "run_dir": str(training.run)}
        assert not (training.run / "model.safetensors").exists()
    training.finish()
    assert training.status["state"] == "finished"
    training.assert_gone()


RICH = {
    "method": {
        "loss": "cross_entropy",
        "label_smoothing": 0.1,
        "match": {
            **{"every_steps": 4, "momentum": 0.5, "refit_cosine": 0.5},
            **{"statistic": "pooled", "solver": "quadratic"},
        },
    },
    "model": {"freeze_epochs": 1, "freeze_before": "blocks.1", "freeze_norm": True},
    "optim": {"name": "adamw", "lr": 0.003, "clip_norm": 1.0},
    "train": {
        **{"mixup": 0.4, "cutmix": 1.0, "ema": 0.9, "log_every_steps": 5},
        **{"accumulate": 2, "checkpoint_activations": True},
    },
    "checkpoint": {"every_steps": 6},
    "data": {"rand_augment": 2, "color_jitter": [0.4, 0.4, 0.4, 0.1], "erasing": 0.3, "flip": 0.5},
}
CHAINS = [
    pytest.param(
        1, {}, ["term group", "kill group", "usr2 launcher"], id="1 process", marks=pytest.mark.thorough
    ),
    pytest.param(2, RICH, ["kill one rank"], id="2 processes, every option"),
    pytest.param(
        2,
        {},
        ["term one rank", "kill one torchrun", "usr2 launcher", "term group", "kill group"],
        id="2 processes, single processes and groups",
        marks=pytest.mark.thorough,
    ),
    pytest.param(4, {}, ["kill one rank", "term launcher"], id="4 processes", marks=pytest.mark.thorough),
]


@pytest.mark.parametrize(("nproc", "changes", "ways"), CHAINS)
def test_interrupted_at_random_steps(
    nproc: int,
    changes: dict[str, object],
    ways: list[str],
    train: Callable[..., Training],
    undisturbed: Undisturbed,
) -> None:
    rng = random.Random(f"{nproc} {ways}")
    share = (STEPS - 30) // len(ways)  # a fast machine runs a dozen steps before a signal arrives
    steps = [i * share + rng.randint(5, share - 5) for i in range(len(ways))]
    training = train(nproc, changes=changes)
    interrupt(training, ways, steps, nproc)
    assert_identical(training.run, undisturbed(nproc, changes).run)


def test_undisturbed_run_learns_and_changes_the_assignment(undisturbed: Undisturbed) -> None:
    """Runs that learn nothing would also be bit-identical."""
    outcome = outcome_of(undisturbed(1, {}).run)
    assert outcome.result["steps"] == STEPS
    assert outcome.result["top1_best"] > 20
    assert sum(outcome.result["labels_moved"]) > 20
    assert outcome.assignment != sorted(outcome.assignment)
    losses = [v for (name, _), v in outcome.points.items() if name == "train/loss"]
    assert len(losses) == STEPS
    assert [s for name, s in outcome.points if name == "val/top1"] == [29, 58, 87]


def test_without_figures_no_figures_or_pages_are_written(undisturbed: Undisturbed) -> None:
    run = undisturbed(1, {}).run
    assert (run / "validation.json").exists()
    for name in ("pictures", "summary.html", "confusion.html", "per_class.csv"):
        assert not (run / name).exists()


def test_finished_run_is_reported_and_not_repeated(undisturbed: Undisturbed) -> None:
    training = undisturbed(1, {})
    before = (training.run / "status.json").read_bytes()
    again = training.finish()
    assert "is finished" in again.error
    assert again.result["steps"] == STEPS
    assert (training.run / "status.json").read_bytes() == before


def test_killed_while_a_checkpoint_is_written(train: Callable[..., Training]) -> None:
    """A wide model makes the write take long enough to be interrupted; the partial checkpoint is ignored."""
    wide = {
        "data": IN_MEMORY,
        "model": {"widths": [96, 192, 384]},
        "train": {"epochs": 1, "max_steps": 6, "batch_size": 16},
        "checkpoint": {"every_steps": 2},
    }
    whole, cut = train(1, "whole", wide), train(1, "cut", wide)
    whole.finish()
    partial: list[Path] = []

    def writing() -> bool:
        partial[:] = [p for p in cut.run.glob("checkpoints/.aside-*") if "old" not in p.name]
        return bool(partial) and (cut.run / "latest").exists()

    started = cut.start()
    cut.wait_for(started, writing, "a second checkpoint is being written")
    started.signal_group(signal.SIGKILL)
    started.wait()
    cut.assert_gone()
    left = [p for p in partial if p.exists()]
    assert left, "the checkpoint was complete before the kill"
    finished = cut.finish()
    assert not any(p.exists() for p in left), "partial checkpoints are removed"
    assert "resuming" in finished.error
    assert_identical(cut.run, whole.run)


@pytest.mark.thorough
def test_interrupted_while_validating(train: Callable[..., Training], digits: Path) -> None:
    """Validating the training images in batches of two takes long enough to be interrupted."""
    steps_per_epoch = 14
    long = {
        "data": {"val_root": str(digits / "train")},
        "train": {"epochs": 2, "batch_size": 96, "eval_batch_size": 2},
        "checkpoint": {"every_steps": steps_per_epoch},
    }
    whole, cut = train(2, "whole", long), train(2, "cut", long)
    whole.finish()
    for epoch, way in ((1, "term launcher"), (2, "kill group")):
        started = cut.start()
        # The assignment update that ends the epoch is logged right before validation begins.
        marker, saved = f"step {epoch * steps_per_epoch}: assignment", f"step-{epoch * steps_per_epoch:09d}"
        complete = cut.run / "checkpoints" / saved / "COMPLETE"
        cut.wait_for(started, lambda s=started, m=marker, c=complete: m in s.error and c.exists(), marker)
        interrupt_once(way, started, cut.run, random.Random(0))
        code = started.wait()
        cut.assert_gone()
        validated = f"step {epoch * steps_per_epoch}: top-1"
        assert validated not in started.error, "validation had ended before the interruption"
        if way == "term launcher":
            assert code == STOPPED
            assert (cut.status["state"], cut.status["phase"]) == ("stopped", "evaluate")
    finished = cut.finish()
    assert finished.result["num_validated"] == 1438
    assert finished.error.count("top-1") == 1, "only the missing validation runs"
    assert_identical(cut.run, whole.run)


@pytest.mark.thorough
def test_killed_during_an_assignment_update(train: Callable[..., Training]) -> None:
    """With 500 classes and a tiny network nearly all the time is spent in assignment updates."""
    matching = {
        "data": {"dataset": "synthetic", "num_classes": 500, "synthetic_samples": [2048, 64], "root": None},
        "model": {"widths": [2, 2, 2], "embedding_dim": 260},
        "method": {"match": {"every_steps": 1}},
        "train": {"epochs": 1, "batch_size": 32},
        "checkpoint": {"every_steps": 5},
    }
    whole, cut = train(2, "whole", matching), train(2, "cut", matching)
    whole.finish()
    interrupt(cut, ["kill one rank", "term launcher"], [17, 40], seed=0)
    assert_identical(cut.run, whole.run)
    assert len(outcome_of(cut.run).result["labels_moved"]) == 64


def test_resumed_with_another_number_of_processes(train: Callable[..., Training]) -> None:
    two = train(2, "run")
    started = two.start()
    two.wait_for_step(started, 33, 0)
    os.kill(started.pid, signal.SIGTERM)
    assert started.wait() == STOPPED
    assert two.status["step"] >= 33
    one = train(1, "run")
    finished = one.finish()
    assert "world_size: 2 -> 1" in finished.error
    result = finished.result
    assert (result["steps"], result["world_size"], result["num_validated"]) == (STEPS, 1, 359)
    losses = [s for n, s in sorted(outcome_of(one.run).points) if n == "train/loss"]
    assert losses == list(range(1, STEPS + 1))
