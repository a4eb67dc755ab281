"""A refused `train`, `submit` or `resume` changes neither the run nor what the next command starts from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from dl2pa.config import dump_config, load_config
from dl2pa.config.identity import data_identity
from dl2pa.errors import UserError
from dl2pa.osutil import read_json
from dl2pa.rundir import RunDirectory
from dl2pa.runplan import DataFacts, RunSpec, check_resume, plan_runs
from support.commands import Completed, process_state_restored, run_here

CONFIG: dict[str, Any] = {
    "data": {"dataset": "synthetic", "num_classes": 5, "synthetic_samples": [32, 8], "image_size": 8},
    "model": {"backbone": "resnet8", "embedding_dim": 3, "widths": [4, 4, 4]},
    "train": {"epochs": 2, "batch_size": 8},
    "checkpoint": {"every_steps": 1},
    "tracking": {"enabled": False},
    "launch": {"device": "cpu", "threads": 1},
}
SBATCH = """#!/bin/sh
case "$1" in
  --test-only) cat > /dev/null;;
  *) if [ -e "$FOLDER/refuse" ]; then echo "sbatch: error: no" >&2; exit 1; fi; echo "Submitted batch job 77";;
esac
"""
ENDED = "#!/bin/sh\n"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    (tmp_path / "bin").mkdir()
    programs = {"sbatch": SBATCH, **dict.fromkeys(("squeue", "scancel", "scontrol", "srun"), ENDED)}
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text, encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FOLDER", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def run(place: Path) -> RunDirectory:
    return RunDirectory(place / "run")


def train(*words: object, env: dict[str, str] | None = None) -> Completed:
    return run_here("train", "tiny.yaml", "--run-dir", "run", "--json", *words, env=env)


def start_without_command(*overrides: str) -> UserError:
    """Start an attempt as a rank does, without the checks of the command, and return the error."""
    from dl2pa.training.run import train

    with process_state_restored(), pytest.raises(UserError) as caught:
        train(load_config("tiny.yaml", overrides), Path("run").absolute(), "tiny")
    return caught.value


def content(folder: Path, *ignored: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ignored
    }


def written_status(run: RunDirectory) -> dict[str, Any]:
    return {key: value for key, value in run.status().items() if key != "updated"}


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("optim.name=adamw", "optim.name"),
        ("train.seed=7", "train.seed"),
        ("data.synthetic_samples=[40, 8]", "data.synthetic_samples"),
        ("train.max_steps=3", "train.max_steps"),
        ("train.epochs=1", "train.epochs"),
        ("method.prototypes=gone.npy", "method.prototypes"),
    ],
)
def test_a_refused_train_changes_no_file_of_a_run(override: str, field: str, run: RunDirectory) -> None:
    assert train().code == 0
    before = content(run.root)
    done = train(override)
    assert (done.code, done.result["error"]["field"]) == (2, field)
    assert content(run.root) == before


@pytest.mark.parametrize(
    "state",
    [
        {"state": "finished", "error": None},
        {"state": "stopped", "error": None},
        {"state": "failed", "error": "the loss is NaN"},
        {"state": "running", "error": None},
    ],
    ids=lambda state: state["state"],
)
@pytest.mark.parametrize("override", ["optim.name=adamw", "train.epochs=1", "train.max_steps=3"])
def test_an_attempt_that_a_rank_refuses_is_withdrawn(
    state: dict[str, Any], override: str, run: RunDirectory
) -> None:
    assert train().code == 0
    run.write_status(**state)
    run.error_file(0).write_text('{"message": "the loss is NaN"}', encoding="utf-8")
    before, status = content(run.root, "status.json", "owner.json", "rank-0.log"), written_status(run)
    error = start_without_command(override)
    assert error.field == override.partition("=")[0]
    assert written_status(run) == status
    report = run.error_file(0, refused=True)
    assert read_json(report)["error"]["field"] == error.field
    report.unlink()
    assert content(run.root, "status.json", "owner.json", "rank-0.log") == before
    if state["state"] != "finished":
        assert train("train.epochs=3").code == 0
        assert (run.status()["state"], run.status()["attempt"]) == ("finished", 2)


def test_a_run_that_was_refused_from_the_start_says_why_and_has_no_attempt(run: RunDirectory) -> None:
    for source in ("gone.npy", "other.npy"):
        error = start_without_command(f"method.prototypes={source}")
        assert run.status()["state"] == "failed"
        assert run.status()["error"] == str(error)
        assert run.status()["attempt"] == 0
        assert not run.config.exists()
    assert train().code == 0
    assert (run.status()["state"], run.status()["attempt"], run.status()["error"]) == ("finished", 1, None)


def test_a_rank_that_refuses_does_not_count_as_an_attempt(run: RunDirectory) -> None:
    """The ranks refuse a supervised training of two processes, which the command does not check first."""
    assert train().code == 0
    run.write_status(state="stopped")
    status = written_status(run)
    done = train("optim.name=adamw", "--nproc", "2", env={"DL2PA_SUPERVISED": "1"})
    assert (done.code, done.result["error"]["field"]) == (2, "optim.name"), done.error
    assert written_status(run) == status


def submit(*words: object) -> Completed:
    return run_here("submit", "tiny.yaml", "--run-dir", "run", "--json", *words)


def resume(*words: object) -> Completed:
    return run_here("resume", "run", "--json", *words)


def test_a_job_that_slurm_refuses_leaves_the_submission_as_it_was(place: Path, run: RunDirectory) -> None:
    (place / "refuse").touch()
    assert submit().code == 2
    assert content(run.root) == {}
    (place / "refuse").unlink()
    assert submit().code == 0
    run.cancelled_file.touch()
    (run.submission / "without-progress.stops").write_text("1", encoding="utf-8")
    before = content(run.root)
    modes = {name: (run.root / name).stat().st_mode for name in before}
    (place / "refuse").touch()
    for command in (submit, resume):
        assert command("train.epochs=9").code == 2
        assert content(run.root) == before
        assert {name: (run.root / name).stat().st_mode for name in before} == modes
    (place / "refuse").unlink()
    assert resume("train.epochs=9").code == 0
    assert load_config(run.submitted_config).train.epochs == 9
    assert not run.cancelled_file.exists()


@pytest.mark.parametrize(
    "override",
    [
        "train.epochs=many",
        "train.epochs",
        "train.epoch=3",
        "train.batch_size=64",
        "method.prototypes=gone.npy",
        "data.dataset=imagefolder",
        "launch.device=cuda",
        "optim.name=adamw",
        "train.epochs=1",
        "train.max_steps=3",
    ],
)
def test_a_refused_override_of_resume_is_not_stored(override: str, run: RunDirectory) -> None:
    assert train().code == 0
    assert submit("train.epochs=4").code == 0
    before = content(run.root)
    assert resume(override, "--gpus-per-node", "0").code == 2
    assert content(run.root) == before
    assert resume().code == 0
    assert load_config(run.submitted_config).train.epochs == 4


@pytest.mark.parametrize(
    ("facts", "field"),
    [
        (DataFacts(data_identity("one", ["a", "b"]), 32, 2), None),
        (DataFacts(data_identity("other", ["a", "b"]), 32, 2), "data.root"),
        (DataFacts(data_identity("one", ["b", "a"]), 32, 2), "data.classes"),
        (DataFacts(data_identity("one", ["a", "b"]), 24, 2), "train.epochs"),
    ],
)
def test_other_data_is_refused_before_an_attempt(
    facts: DataFacts, field: str | None, run: RunDirectory
) -> None:
    recorded = data_identity("one", ["a", "b"])
    attempt = {"attempt": 1, "data_fingerprint": "one", "data_classes": recorded["data.classes"]}
    for name, text in (
        ("config.yaml", dump_config(load_config("tiny.yaml"))),
        ("environment.json", json.dumps({"attempts": [attempt]})),
        ("checkpoints/step-000000008/COMPLETE", "{}"),
    ):
        (run.root / name).parent.mkdir(parents=True, exist_ok=True)
        (run.root / name).write_text(text, encoding="utf-8")
    (plan,) = plan_runs([RunSpec(Path("tiny.yaml"), ())], Path("run"))
    if field is None:
        check_resume(plan, facts)
        return
    with pytest.raises(UserError) as caught:
        check_resume(plan, facts)
    assert caught.value.field == field


def test_a_change_that_the_job_refuses_is_taken_back(run: RunDirectory) -> None:
    """Some errors are found on the compute node only. The next `resume` starts from what a job has accepted."""
    job = {"DL2PA_SUPERVISED": "1", "DL2PA_LAUNCHED": "a"}
    assert submit("tracking.uri=http://me:secret@127.0.0.1:9").code == 0
    assert run_here("train", run.submitted_config, "--run-dir", "run", "--json", env=job).code == 0
    accepted = run.submitted_config.read_bytes()
    assert b"secret" in accepted and b"secret" not in run.accepted_config.read_bytes()
    tree = yaml.safe_load(accepted)
    tree["train"]["epochs"] = 3
    tree["method"]["prototypes"] = "gone.npy"
    run.submitted_config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    done = run_here("train", run.submitted_config, "--run-dir", "run", "--json", env=job)
    assert (done.code, done.result["error"]["field"]) == (2, "method.prototypes")
    assert run.submitted_config.read_bytes() == accepted
    assert run.submitted_config.stat().st_mode & 0o077 == 0
    assert resume("train.epochs=3").code == 0
    assert load_config(run.submitted_config).method.prototypes == "auto"
