"""Runs that are killed and continued by the same command end bit for bit as one that was left alone."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS_PER_EPOCH = 29  # 1,438 images, batches of 48
STEPS = 3 * STEPS_PER_EPOCH
STOPPED, FAILED = 75, 1

_ASKED = ("term launcher", "usr2 launcher", "term group", "term one rank")


def strike(how: str, started: Any, run: Path, rng: random.Random, helpers: Any) -> set[int]:
    """Do to the attempt what `how` says; returns the exit codes it may then end with."""
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
        members = [p for p in helpers.processes_of(run) if p.kind == kind]
        assert members, f"no {kind} runs"
        os.kill(rng.choice(members).pid, signal.SIGTERM if number == "term" else signal.SIGKILL)
        return {STOPPED} if how in _ASKED else {FAILED}
    return {STOPPED}


def interrupt(training: Any, ways: list[str], steps: list[int], seed: int, helpers: Any) -> None:
    """Start the run and strike it at each of the steps; then let it finish."""
    rng = random.Random(seed)
    for way, step in zip(ways, steps, strict=True):
        attempt = training.status.get("attempt", 0)
        started = training.start()
        training.wait_for_step(started, step, attempt)
        expected = strike(way, started, training.run, rng, helpers)
        code = started.wait()
        assert code in expected, f"{way} at step {step}: exit code {code}\n{started.error}"
        training.assert_gone()
        status = training.status
        assert status["attempt"] == attempt + 1
        if code == STOPPED:
            assert status["state"] == "stopped"
            assert (training.run / "checkpoints" / f"step-{status['step']:09d}" / "COMPLETE").exists()
            assert status["step"] < STEPS, "a stop does not wait for the end"
            assert started.result == {"stopped": True, "step": status["step"], "run_dir": str(training.run)}
        assert not (training.run / "model.safetensors").exists()
    finished = training.finish()
    assert finished.result["epochs"] == 3
    assert training.status["state"] == "finished"
    training.assert_gone()


CHAINS = [
    pytest.param(1, ["term launcher", "kill group", "usr2 launcher", "term group"], id="1"),
    pytest.param(2, ["usr2 launcher", "kill one rank", "term group", "kill group"], id="2"),
    pytest.param(
        2,
        ["term one rank", "kill one torchrun", "term launcher"],
        id="2, parts of it",
        marks=pytest.mark.thorough,
    ),
    pytest.param(4, ["kill one rank", "term launcher"], id="4", marks=pytest.mark.thorough),
]


@pytest.mark.parametrize(("nproc", "ways"), CHAINS)
def test_killed_at_random_steps(
    nproc: int,
    ways: list[str],
    train: Callable[..., Any],
    reference: Callable[[int], Path],
    helpers: Any,
) -> None:
    rng = random.Random(f"{nproc} {ways}")
    share = (STEPS - 30) // len(ways)  # a fast machine does a dozen steps before a signal has gone round
    steps = [i * share + rng.randint(5, share - 5) for i in range(len(ways))]
    training = train(nproc)
    interrupt(training, ways, steps, nproc, helpers)
    helpers.assert_identical(training.run, reference(nproc))


def test_reference_really_learns_and_moves_labels(reference: Callable[[int], Path], helpers: Any) -> None:
    """Two runs that do nothing would agree bit for bit as well."""
    outcome = helpers.outcome_of(reference(1))
    assert outcome.result["steps"] == STEPS
    assert outcome.result["top1_best"] > 20
    assert sum(outcome.result["labels_moved"]) > 20
    assert outcome.assignment != sorted(outcome.assignment)
    losses = [v for (name, _), v in outcome.points.items() if name == "train/loss"]
    assert len(losses) == STEPS
    assert [s for name, s in outcome.points if name == "val/top1"] == [29, 58, 87]


RICH = {
    "method": {
        "loss": "cross_entropy",
        "label_smoothing": 0.1,
        "match": {"every_steps": 4, "momentum": 0.5, "refit_cosine": 0.5},
    },
    "optim": {"name": "adamw", "lr": 0.003, "clip_norm": 1.0},
    "train": {"mixup": 0.4, "cutmix": 1.0, "ema": 0.9, "log_every": 5, "epochs": 2},
    "checkpoint": {"every_steps": 6},
    "data": {"trivial_augment": True, "erasing": 0.3, "flip": 0.5},
}


def test_killed_with_mixing_average_and_scaled_cross_entropy(train: Callable[..., Any], helpers: Any) -> None:
    whole, cut = train(2, "whole", RICH), train(2, "cut", RICH)
    whole.finish(limit=1)
    for way, step in (("kill group", 25),):
        attempt = cut.status.get("attempt", 0)
        started = cut.start()
        cut.wait_for_step(started, step, attempt)
        strike(way, started, cut.run, random.Random(0), helpers)
        started.wait()
        cut.assert_gone()
    cut.finish()
    helpers.assert_identical(cut.run, whole.run)


def test_killed_while_a_checkpoint_is_written(train: Callable[..., Any], helpers: Any) -> None:
    """A wide model makes the write long enough to be met in the middle; what it leaves is passed over."""
    wide = {
        "model": {"widths": [96, 192, 384]},
        "train": {"epochs": 1, "max_steps": 6, "batch_size": 16},
        "checkpoint": {"every_steps": 2},
    }
    whole, cut = train(1, "whole", wide), train(1, "cut", wide)
    whole.finish(limit=1)
    asides: list[Path] = []

    def writing() -> bool:
        asides[:] = [p for p in cut.run.glob("checkpoints/.aside-*") if "old" not in p.name]
        return bool(asides) and (cut.run / "latest").exists()

    started = cut.start()
    cut.wait_for(started, writing, "a second checkpoint is being written")
    started.signal_group(signal.SIGKILL)
    started.wait()
    cut.assert_gone()
    left = [p for p in asides if p.exists()]
    assert left, "the write was over before the kill"
    finished = cut.finish(limit=1)
    assert not any(p.exists() for p in left), "leftovers are removed"
    assert "resuming" in finished.error
    helpers.assert_identical(cut.run, whole.run)


def test_interrupted_while_validating(train: Callable[..., Any], digits: Path, helpers: Any) -> None:
    """Validating the training images in pairs takes long enough to be met in the middle."""
    steps_per_epoch = 14
    long = {
        "data": {"val_root": str(digits / "train")},
        "train": {"epochs": 2, "batch_size": 96, "eval_batch_size": 2},
        "checkpoint": {"every_steps": steps_per_epoch},
    }
    whole, cut = train(2, "whole", long), train(2, "cut", long)
    whole.finish(limit=1)
    for epoch, way in ((1, "term launcher"), (2, "kill group")):
        started = cut.start()
        # The matching that ends the epoch is told right before its validation begins.
        marker, saved = f"step {epoch * steps_per_epoch}: matching", f"step-{epoch * steps_per_epoch:09d}"
        complete = cut.run / "checkpoints" / saved / "COMPLETE"
        cut.wait_for(started, lambda s=started, m=marker, c=complete: m in s.error and c.exists(), marker)
        strike(way, started, cut.run, random.Random(0), helpers)
        code = started.wait()
        cut.assert_gone()
        assert f"epoch {epoch}/2" not in started.error, "the validation was over before the strike"
        if way == "term launcher":
            assert code == STOPPED
            assert (cut.status["state"], cut.status["phase"]) == ("stopped", "evaluate")
    finished = cut.finish(limit=1)
    assert finished.result["num_validated"] == 1438
    assert finished.error.count("top-1") == 1, "only what is missing is validated"
    helpers.assert_identical(cut.run, whole.run)


def test_killed_in_the_middle_of_matching(train: Callable[..., Any], helpers: Any) -> None:
    """500 labels matched after every step of a tiny network: nearly all the time passes in matchings."""
    matching = {
        "data": {"dataset": "synthetic", "num_classes": 500, "synthetic_samples": [2048, 64], "root": None},
        "model": {"widths": [2, 2, 2], "embedding_dim": 260},
        "method": {"match": {"every_steps": 1}},
        "train": {"epochs": 1, "batch_size": 32},
        "checkpoint": {"every_steps": 5},
    }
    whole, cut = train(2, "whole", matching), train(2, "cut", matching)
    whole.finish(limit=1)
    for way, step in (("kill one rank", 17), ("term launcher", 40)):
        attempt = cut.status.get("attempt", 0)
        started = cut.start()
        cut.wait_for_step(started, step, attempt)
        strike(way, started, cut.run, random.Random(step), helpers)
        started.wait()
        cut.assert_gone()
    cut.finish()
    helpers.assert_identical(cut.run, whole.run)
    assert len(helpers.outcome_of(cut.run).result["labels_moved"]) == 64


def test_killed_right_after_an_epoch_neither_repeats_nor_skips_one(
    train: Callable[..., Any], helpers: Any
) -> None:
    """With checkpoints by epoch alone, any kill in the second epoch resumes exactly at the boundary."""
    by_epoch = {"checkpoint": {"every_steps": 0}, "train": {"epochs": 2}}
    whole, cut = train(1, "whole", by_epoch), train(1, "cut", by_epoch)
    whole.finish(limit=1)
    started = cut.start()
    cut.wait_for_step(started, STEPS_PER_EPOCH + 6, 0)
    started.signal_group(signal.SIGKILL)
    started.wait()
    assert (cut.run / "latest").read_text().strip() == "step-000000029"
    finished = cut.finish(limit=1)
    assert "resuming at epoch 1, step 29" in finished.error
    assert "epoch 1/2" not in finished.error
    assert (finished.result["epochs"], finished.result["steps"]) == (2, 58)
    helpers.assert_identical(cut.run, whole.run)


def test_continued_with_another_number_of_processes(train: Callable[..., Any], helpers: Any) -> None:
    two = train(2, "run")
    started = two.start()
    two.wait_for_step(started, 33, 0)
    os.kill(started.pid, signal.SIGTERM)
    assert started.wait() == STOPPED
    stopped_at = two.status["step"]
    one = train(1, "run")
    finished = one.start()
    assert finished.wait() == 0, finished.error
    assert "world_size: 2 -> 1" in finished.error
    result = finished.result
    assert (result["steps"], result["world_size"], result["num_validated"]) == (STEPS, 1, 359)
    assert [s for n, s in sorted(helpers.outcome_of(one.run).points) if n == "train/loss"] == list(
        range(1, STEPS + 1)
    )
    assert stopped_at >= 33


def test_finished_run_says_so_and_does_nothing(reference: Callable[[int], Path], helpers: Any) -> None:
    run = reference(1)
    before = (run / "status.json").read_bytes()
    program = helpers.Program(run.parent)
    again = program.run(
        *("train", run.parent / "small.yaml", "--nproc", "1", "--run-dir", run, "--json"),
    )
    assert again.process.returncode == 0
    assert "is finished" in again.error
    assert again.result["steps"] == STEPS
    assert (run / "status.json").read_bytes() == before
