"""The Python API: what it refuses, how it stops, and what it returns. tests/integration/test_api.py trains."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dl2pa
from dl2pa import TrainingFailure, UserError, api
from dl2pa.errors import UserErrors
from dl2pa.process import shown_words
from dl2pa.rundir import RunDirectory
from dl2pa.tracking.sync_state import SyncState, save_sync_state

CONFIG: dict[str, Any] = {
    "data": {"dataset": "synthetic", "num_classes": 5, "synthetic_samples": [16, 7], "image_size": 8},
    "model": {"backbone": "resnet8", "embedding_dim": 3},
    "launch": {"device": "cpu"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_public_name_can_be_imported() -> None:
    assert set(dl2pa.__all__) <= set(dir(dl2pa))
    assert all(getattr(dl2pa, name).__name__ == name for name in dl2pa.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        dl2pa.trian  # noqa: B018


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("gone.yaml", {}, "no such file"),
        (CONFIG, {"epochs": 5}, "epochs=5: unknown key"),
        (CONFIG, {"train": {"epoch": 5}}, "train.epoch=5: unknown key"),
        ({**CONFIG, "trian": {}}, {}, "unknown key. Did you mean train"),
        (CONFIG, {"train.epochs": "many"}, "train.epochs='many'"),
        (CONFIG, {"optim": {"lr": object()}}, "optim.lr=.*cannot be a object"),
        ({**CONFIG, "model": {"widths": {3, 4}}}, {}, "model.widths=.*cannot be a set"),
        ({"base": "gone.yaml"}, {}, "no such file"),
    ],
)
def test_invalid_configuration_is_refused_in_this_process(
    config: Any, overrides: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(api, "_run", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(UserError, match=message):
        dl2pa.train(config, **overrides)
    assert not any(folder.iterdir())


@pytest.mark.parametrize("wrong", [3, None, ["a.yaml"], b"a.yaml", "", "a\0b", "~no-such-user/a", object])
@pytest.mark.parametrize("field", ["config", "run_dir", "run"])
def test_what_is_no_path_is_refused(
    wrong: Any, field: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(api, "_run", lambda *_: pytest.fail("a process was started"))
    calls = {
        "config": lambda: dl2pa.train(wrong),
        "run_dir": lambda: dl2pa.train(CONFIG, run_dir=wrong or "\0"),
        "run": lambda: dl2pa.load(wrong),
    }
    with pytest.raises(UserError) as caught:
        calls[field]()
    assert caught.value.field == field
    assert caught.value.remedy
    assert not any(folder.iterdir())


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: dl2pa.train(CONFIG, quiet="yes"), "quiet"),
        (lambda: dl2pa.train({3: {}}), "3"),
        (lambda: dl2pa.train(CONFIG, train=3), "train"),
        (lambda: dl2pa.load("run", checkpoint=["best"]), "checkpoint"),
        (lambda: dl2pa.load("run", checkpoint=3), "checkpoint"),
        (lambda: api._device(0), "device"),
        (lambda: api._device(None), "device"),
        (lambda: api._device("cpu:x"), "device"),
    ],
)
def test_arguments_of_another_type_are_refused(call: Any, field: str, folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.field == field
    assert not any(folder.iterdir())


def test_error_of_the_training_process_is_raised_here(folder: Path) -> None:
    data = {**CONFIG["data"], "dataset": "imagefolder", "root": "gone"}
    with pytest.raises(UserError) as caught:
        dl2pa.train({**CONFIG, "data": data}, quiet=True)
    assert (caught.value.field, caught.value.value) == ("data.root", "gone")
    assert not any(folder.iterdir())


def test_all_problems_of_the_training_process_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = UserErrors(
        [UserError("a", 1, "is wrong", "Mend it."), UserError("b", 2, "is, too", "Mend it.")]
    )
    started(monkeypatch, 2, json.dumps({"error": problems.as_dict()}))
    with pytest.raises(UserError, match="2 problems") as caught:
        dl2pa.train(CONFIG)
    assert [problem.field for problem in caught.value.problems] == ["a", "b"]


def started(monkeypatch: pytest.MonkeyPatch, code: int = 75, output: str = "") -> list[list[str]]:
    """Replace the training process by one that only ends; returns its arguments and the configuration."""
    commands: list[list[str]] = []

    def end(command: list[str], quiet: bool, standard_input: int) -> tuple[int, str]:
        arguments = json.loads(os.read(standard_input, 10_000))
        assert command[1:] == ["-P", "-m", "dl2pa.private_command", *shown_words(arguments)]
        commands.append([*arguments, Path(arguments[1]).read_text()])
        return code, output

    monkeypatch.setattr(api, "_run", end)
    return commands


def test_values_reach_the_command_as_text(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    commands = started(monkeypatch)
    Path("small.yaml").write_text("train: {epochs: 9}\n")
    config = {**CONFIG, "base": "small.yaml", "data": {**CONFIG["data"], "root": Path("a b")}}
    result = dl2pa.train(config, optim={"lr": np.float32(0.5)}, train={"epochs": np.int64(3)}, run_dir="here")
    (command,) = commands
    assert command[0] == "train"
    assert command[2:-1] == [
        'optim={"lr": 0.5}',
        'train={"epochs": 3}',
        "--run-dir",
        str(folder / "here"),
        "--json",
    ]
    assert f"base: [{folder / 'small.yaml'}]" in command[-1]
    assert "root: a b" in command[-1]
    assert not Path(command[1]).exists(), "the temporary configuration is removed"
    assert result.run_dir == folder / "here"
    other = dl2pa.train("small.yaml", **{"train.epochs": 2, "data.dataset": "synthetic"})
    assert commands[1][1:-1] == [
        *("small.yaml", "train.epochs=2", "data.dataset=synthetic"),
        *("--run-dir", str(other.run_dir), "--json"),
    ]
    assert other.run_dir.parent == folder / "runs"


@pytest.mark.parametrize(
    ("code", "output", "message"),
    [
        (
            1,
            '{"error": {"field": null, "message": "rank 0: loss is nan"}}',
            "rank 0: loss is nan; see /.*logs",
        ),
        (1, "no JSON", "exit code 1"),
        (-9, "", "killed by signal 9"),
    ],
)
def test_failed_run_raises_its_reason(
    code: int, output: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(monkeypatch, code, output)
    with pytest.raises(TrainingFailure, match=message):
        dl2pa.train(CONFIG)


def test_stopped_run_returns_what_it_has_reached(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    started(monkeypatch)
    before = dl2pa.train(CONFIG, run_dir="run")
    assert (before.state, before.last, before.best, before.mlflow_run_id) == ("stopped", {}, {}, None)
    run = RunDirectory(folder / "run")
    run.create()
    run.write_status(state="stopped", top1=40.0, epoch_last=6, top1_best=41.5, epoch_best=4)
    run.events.mkdir()
    save_sync_state(run.root, "sqlite:///mlflow.db", SyncState("abc"))
    result = dl2pa.train(CONFIG, run_dir="run")
    assert (result.last, result.best) == ({"epoch": 6, "top1": 40.0}, {"epoch": 4, "top1": 41.5})
    assert (result.state, result.mlflow_run_id) == ("stopped", "abc")
    assert result.elapsed_s > 0


SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(75)))
print("ready", file=sys.stderr, flush=True)
signal.pause()
"""


def test_interrupt_waits_for_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends itself after the signal that this one forwards; only then the interrupt is raised."""
    lines: list[str] = []

    def show(line: str) -> None:
        lines.append(line)
        os.kill(os.getpid(), signal.SIGINT)

    ended: list[int] = []
    wait = api._wait

    def note(process: Any) -> Any:
        result = wait(process)
        ended.append(result[0])
        return result

    monkeypatch.setattr(api, "_show", show)
    monkeypatch.setattr(api, "_wait", note)
    assert threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            api._run([sys.executable, "-c", SAVES], False)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert (lines, ended) == (["ready\n"], [75])


def test_log_of_the_process_is_copied_unless_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", "import sys; print('result'); print('größe', file=sys.stderr)"]
    assert api._run(command, False) == (0, "result\n")
    assert capsys.readouterr() == ("", "größe\n")
    assert api._run(command, True) == (0, "result\n")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "model"),
        ({"checkpoint": "last"}, "checkpoint"),
        ({"checkpoint": "best"}, "run"),
    ],
)
def test_missing_model_is_refused(options: Any, field: str) -> None:
    with pytest.raises(UserError) as caught:
        dl2pa.load("gone", **options)
    assert caught.value.field == field


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 3.5])
def test_missing_device_is_refused(device: Any) -> None:
    with pytest.raises(UserError, match="Use auto, cpu, cuda or cuda:N") as caught:
        api._device(device)
    assert caught.value.field == "device"
