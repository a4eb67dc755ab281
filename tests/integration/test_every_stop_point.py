"""A small run in this process, stopped or killed at every stop point."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dl2pa.config import load_config
from dl2pa.errors import UserError
from dl2pa.training.run import train as train_here
from dl2pa.training.stop import StopMonitor
from support.commands import process_state_restored, run_here
from support.runs import IN_MEMORY, assert_identical, config_with, outcome_of, read_status

DONE, STOPPED = 0, 75
TINY = {
    "train": {"epochs": 2, "batch_size": 16, "eval_batch_size": 24, "log_every_steps": 2},
    "method": {"match": {"early_steps": 2, "early_epochs": 1}},
    "checkpoint": {"every_steps": 2, "keep": 3},
}
WARM_UP_THEN_FIXED = {
    **TINY,
    "data": IN_MEMORY,
    "method": {
        "loss": "cross_entropy",
        "logit_adjustment": 1.0,
        "match": {"warmup_epochs": 1, "last_epoch": 1, "refit_cosine": 0.5, "early_epochs": 0},
    },
}
WITHOUT_PROGRESS = {
    "data": {**IN_MEMORY, "rand_augment": 2, "color_jitter": [0.4, 0.4, 0.4, 0.1]},
    "model": {"freeze_epochs": "all"},
    "method": {"name": "psc"},
    "optim": {"lr": 1e-12},
    "train": {**TINY["train"], "epochs": 9, "patience": 1},
    "checkpoint": {"every_steps": 2, "keep": 1},
}
"""Every validation has the same accuracy, so that patience ends the run after two epochs."""
TRAIN_STEPS, EVAL_STEPS, EPOCHS = 3, 3, 2
# The trainer polls before every step, after the last one, and before every batch of a validation and the calibration.
STOP_POINTS = EPOCHS * (TRAIN_STEPS + 1 + EVAL_STEPS) + EVAL_STEPS


class Crash(BaseException):
    """Simulates a sudden end of the process: no handler of dl2pa catches it."""


@pytest.fixture(autouse=True)
def unchanged_process(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Restore threads, determinism and log handlers, which training sets for its process."""
    with process_state_restored():
        root = logging.getLogger()
        root.handlers = [caplog.handler]
        root.setLevel(logging.INFO)
        yield
        root.handlers.remove(caplog.handler)


@pytest.fixture(scope="module")
def few_digits(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 training and 7 validation images per class: 3 steps per epoch, 2 images left over, 70 to validate."""
    root = tmp_path_factory.mktemp("few")
    for split, count in (("train", 5), ("val", 7)):
        for folder in sorted((digits / split).iterdir()):
            (root / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, root / split / folder.name)
    return root


class Attempts:
    """Attempts of one run."""

    def __init__(self, config: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = config
        self.run = run
        self._monkeypatch = monkeypatch
        self.polls = 0

    def go(
        self, stop_at: int | None = None, crash_at: int | None = None, overrides: tuple[str, ...] = ()
    ) -> int:
        """Run one attempt; it ends at poll `stop_at` or `crash_at` (1-based). Returns the exit code."""
        self.polls = 0
        before = set(threading.enumerate())  # other tests of this process may have left threads

        def poll(monitor: StopMonitor) -> bool:
            self.polls += 1
            if crash_at is not None and self.polls >= crash_at:
                raise Crash
            return stop_at is not None and self.polls >= stop_at

        self._monkeypatch.setattr(StopMonitor, "poll", poll)
        try:
            return train_here(load_config(self.config, overrides), self.run, "tiny")
        finally:
            for thread in set(threading.enumerate()) - before:
                if thread.name == "dl2pa-save":  # a real crash would have ended this thread too
                    thread.join()


@pytest.fixture
def attempts(few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Attempts]:
    def make(name: str, changes: Mapping[str, Any] = TINY) -> Attempts:
        config = config_with(tmp_path / f"config-{name}", few_digits, changes)
        return Attempts(config, tmp_path / name, monkeypatch)

    return make


def finish(attempt: Attempts) -> None:
    assert attempt.go() == DONE


@pytest.mark.parametrize(
    ("how", "changes"),
    [
        pytest.param("stop", TINY, id="stop"),
        pytest.param("crash", {**TINY, "data": IN_MEMORY}, id="crash"),
        pytest.param("crash", WARM_UP_THEN_FIXED, id="crash, warm-up then fixed", marks=pytest.mark.thorough),
    ],
)
def test_killed_at_any_stop_point_resumes_identically(
    how: str, changes: Mapping[str, Any], attempts: Callable[..., Attempts]
) -> None:
    whole = attempts("whole", changes)
    finish(whole)
    assert whole.polls == STOP_POINTS
    for point in range(1, STOP_POINTS + 1):
        cut = attempts(f"cut-{point}", changes)
        if how == "stop":
            assert cut.go(stop_at=point) == STOPPED
            assert read_status(cut.run)["state"] == "stopped"
        else:
            with pytest.raises(Crash):
                cut.go(crash_at=point)
        assert not (cut.run / "result.json").exists()
        finish(cut)
        assert_identical(cut.run, whole.run)
        history = outcome_of(cut.run).points
        assert [s for n, s in sorted(history) if n == "val/top1"] == [3, 6], f"point {point}"


def test_an_early_stop_is_finished_and_resumes_identically(
    attempts: Callable[..., Attempts], caplog: pytest.LogCaptureFixture
) -> None:
    whole = attempts("whole", WITHOUT_PROGRESS)
    finish(whole)
    assert "stopped early after epoch 2" in caplog.text
    result, status = outcome_of(whole.run).result, read_status(whole.run)
    assert (result["epochs"], result["stopped_early"]) == (2, True)
    assert (status["state"], status["step"], status["total_steps"]) == ("finished", 6, 6)
    assert "dl2pa.stopped_early" in (whole.run / "events/events.jsonl").read_text()
    assert [step.name for step in _checkpoints(whole.run)] == ["step-000000003", "step-000000006"]
    # in training, in validation and in the calibration
    for point in (TRAIN_STEPS + 1 + EVAL_STEPS + 2, STOP_POINTS - EVAL_STEPS - 1, STOP_POINTS - 1):
        cut = attempts(f"cut-{point}", WITHOUT_PROGRESS)
        with pytest.raises(Crash):
            cut.go(crash_at=point)
        finish(cut)
        assert_identical(cut.run, whole.run)
    assert whole.go(overrides=("train.patience=3",)) == DONE
    assert outcome_of(whole.run).result["epochs"] == 4


def test_many_short_attempts_give_the_same_result(attempts: Callable[..., Attempts]) -> None:
    changes = {**TINY, "data": IN_MEMORY}
    whole, cut = attempts("whole", changes), attempts("cut", changes)
    finish(whole)
    codes = []
    for _ in range(4 * STOP_POINTS):
        codes.append(cut.go(stop_at=5))
        if codes[-1] == DONE:
            break
    assert codes[-1] == DONE
    assert codes.count(STOPPED) >= 2
    assert_identical(cut.run, whole.run)


@pytest.mark.thorough
def test_stochastic_depth_and_the_torchvision_loader(attempts: Callable[..., Attempts]) -> None:
    """Swin-T drops residual branches at random: the draws must not depend on where the run was interrupted."""
    swin = {
        "data": {"image_size": 32, "eval_resize": 32, "loader": "torchvision"},
        "model": {"backbone": "swin_t"},
        "optim": {"name": "adamw", "lr": 1e-4, "clip_norm": 1.0},
        "train": {"epochs": 2, "batch_size": 10, "max_steps": 2, "eval_batch_size": 70},
        "checkpoint": {"every_steps": 1, "keep": 1},
    }
    whole, cut = attempts("whole", swin), attempts("cut", swin)
    finish(whole)
    with pytest.raises(Crash):
        cut.go(crash_at=2)
    finish(cut)
    assert_identical(cut.run, whole.run)
    losses = [v for (n, _), v in sorted(outcome_of(cut.run).points.items()) if n == "train/loss"]
    assert len(set(losses)) == 2


def _checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": lambda step: _truncate(step / "state.pt"),
    "a bit flipped": lambda step: _flip_a_bit(step / "state.pt"),
    "state missing": lambda step: (step / "state.pt").unlink(),
    "marker empty": lambda step: (step / "COMPLETE").write_text(""),
    "marker missing": lambda step: (step / "COMPLETE").unlink(),
}


def test_damaged_newest_checkpoint_falls_back_to_the_previous(
    attempts: Callable[..., Attempts], caplog: pytest.LogCaptureFixture
) -> None:
    changes = {**TINY, "data": IN_MEMORY}
    whole, stopped = attempts("whole", changes), attempts("stopped", changes)
    finish(whole)
    assert stopped.go(stop_at=TRAIN_STEPS + 1 + EVAL_STEPS + 3) == STOPPED
    names = [c.name for c in _checkpoints(stopped.run)]
    assert len(names) >= 2
    for damage, apply in DAMAGES.items():
        cut = attempts(damage, changes)
        shutil.copytree(stopped.run, cut.run)
        apply(_checkpoints(cut.run)[-1])
        caplog.clear()
        finish(cut)
        if damage != "marker missing":  # a checkpoint without its marker was never complete
            warned = [
                r for r in caplog.records if r.levelno == logging.WARNING and names[-1] in r.getMessage()
            ]
            assert warned, f"{damage}: no warning names {names[-1]}"
        assert_identical(cut.run, whole.run)


def test_run_with_only_damaged_checkpoints_is_refused(
    attempts: Callable[..., Attempts],
) -> None:
    cut = attempts("cut")
    assert cut.go(stop_at=TRAIN_STEPS + 1 + EVAL_STEPS + 3) == STOPPED
    for checkpoint in _checkpoints(cut.run):
        _truncate(checkpoint / "state.pt")
    before = {p: p.stat().st_size for p in cut.run.glob("checkpoints/*/*")}
    with pytest.raises(UserError):
        cut.go()
    refused = run_here("train", cut.config, "--run-dir", cut.run, "--json")
    assert refused.code == 2
    assert str(cut.run / "checkpoints") in refused.error
    assert "Traceback" not in refused.error
    assert str(cut.run / "checkpoints") in str(refused.result["error"])
    assert {p: p.stat().st_size for p in cut.run.glob("checkpoints/*/*")} == before


def test_changed_model_is_refused_and_changed_rate_is_logged(
    attempts: Callable[..., Attempts], caplog: pytest.LogCaptureFixture
) -> None:
    cut = attempts("cut")
    assert cut.go(stop_at=3) == STOPPED
    with pytest.raises(UserError, match="embedding_dim"):
        cut.go(overrides=("model.embedding_dim=4",))
    with pytest.raises(UserError, match=r"train\.seed"):
        cut.go(overrides=("train.seed=1",))
    assert cut.go(overrides=("optim.lr=0.05",)) == DONE
    assert "optim.lr changed from 0.2 to 0.05" in caplog.text


def test_killed_after_an_epoch_resumes_at_its_end(
    attempts: Callable[..., Attempts], caplog: pytest.LogCaptureFixture
) -> None:
    """With one checkpoint per epoch, a kill in the second epoch resumes at the end of the first."""
    by_epoch = {**TINY, "data": IN_MEMORY, "checkpoint": {"every_steps": 0}}
    whole, cut = attempts("whole", by_epoch), attempts("cut", by_epoch)
    finish(whole)
    with pytest.raises(Crash):
        cut.go(crash_at=TRAIN_STEPS + 1 + EVAL_STEPS + 2)
    assert (cut.run / "latest").read_text().strip() == "step-000000003"
    caplog.clear()
    finish(cut)
    assert "resuming at epoch 1, step 3" in caplog.text
    assert "epoch 1/2" not in caplog.text
    assert_identical(cut.run, whole.run)
