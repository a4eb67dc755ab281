from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dl2pa.errors import UserError
from dl2pa.reporting.runs import Run, Unfinished, find_runs, read_run

MakeRun = Callable[..., Path]


def finished(path: Path) -> Run:
    run = read_run(path)
    assert isinstance(run, Run), run
    return run


def test_a_finished_run_is_read(make_run: MakeRun) -> None:
    path = make_run({"train.seed": 4}, last=61.5, best=62.25, world_size=2, top1_head=70.0, top1_tail=10.0)
    run = finished(path)
    assert (run.path, run.seed, run.finished) == (path, 4, 1001.0)
    assert (run.result.top1_last, run.result.top1_best, run.result.world_size) == (61.5, 62.25, 2)
    assert (run.result.top1_head, run.result.top1_medium, run.result.top1_tail) == (70.0, None, 10.0)
    assert run.environment["git_commit"] == "0123456789abcdef"
    assert run.changed == ()
    assert not run.is_cut


def test_only_a_run_ended_by_max_steps_is_cut(make_run: MakeRun) -> None:
    assert finished(make_run({"train.max_steps": 250})).is_cut
    assert not finished(make_run({"train.max_steps": 5000})).is_cut


@pytest.mark.parametrize(
    ("state", "status", "words"),
    [
        ("running", {"step": 70, "total_steps": 2000}, "at step 70 of 2,000"),
        ("stopped", {"step": 70}, "at step 70"),
        ("failed", {"error": "train.lr=0: no"}, "train.lr=0: no"),
        ("stopping", {}, "at step"),
    ],
)
def test_an_unfinished_run_is_not_compared_even_with_a_result_file(
    state: str, status: dict[str, Any], words: str, make_run: MakeRun
) -> None:
    run = read_run(make_run(state=state, status=status))
    assert isinstance(run, Unfinished)
    assert run.state == state
    assert words in run.reason


def test_a_run_that_was_only_submitted_has_not_started(tmp_path: Path) -> None:
    (tmp_path / "run/slurm").mkdir(parents=True)
    (tmp_path / "run/slurm/job.json").write_text("{}", encoding="utf-8")
    assert find_runs([], tmp_path) == [tmp_path / "run"]
    run = read_run(tmp_path / "run")
    assert isinstance(run, Unfinished)
    assert (run.state, run.reason) == ("not started", "no step done")


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"top1_last": 3}', '{"num_validated": 200, "top1_last": "high"}']
)
def test_a_damaged_result_is_unreadable(content: str | None, make_run: MakeRun) -> None:
    path = make_run()
    if content is None:
        (path / "result.json").unlink()
    else:
        (path / "result.json").write_text(content, encoding="utf-8")
    run = read_run(path)
    assert isinstance(run, Unfinished)
    assert (run.state, "result.json" in run.reason) == ("unreadable", True)


def test_an_accuracy_out_of_range_is_unreadable(make_run: MakeRun) -> None:
    for value in (100.5, -1.0, float("nan")):
        assert isinstance(read_run(make_run(last=value)), Unfinished)


def test_an_unknown_method_is_named_in_the_reason(make_run: MakeRun) -> None:
    path = make_run()
    text = (path / "config.yaml").read_text(encoding="utf-8")
    (path / "config.yaml").write_text(text.replace("name: dl2pa", "name: later"), encoding="utf-8")
    run = read_run(path)
    assert isinstance(run, Unfinished)
    assert run.state == "unreadable"
    assert "method.name='later'" in run.reason


@pytest.mark.parametrize(
    ("before", "changed"),
    [
        ({"optim.lr": 0.3}, ("optim.lr",)),
        ({"train.max_steps": 100}, ()),
        ({"train.epochs": 5}, ()),
        ({"train.epochs": 5, "optim.schedule": "cosine"}, ("optim.schedule",)),
        ({"launch.nproc": 2, "tracking.experiment": "x", "train.log_every_steps": 3, "data.root": "/d"}, ()),
        ({"method.match.every_steps": 5, "optim.lr": 0.3}, ("method.match.every_steps", "optim.lr")),
        ({}, ()),
    ],
)
def test_changes_of_the_recipe_between_attempts_are_listed(
    before: dict[str, Any], changed: tuple[str, ...], make_run: MakeRun, config_with: Callable[..., Any]
) -> None:
    run = finished(make_run(attempts=[config_with(before), config_with()]))
    assert run.changed == changed


def test_a_reverted_change_is_listed(make_run: MakeRun, config_with: Callable[..., Any]) -> None:
    attempts = [config_with(), config_with({"optim.lr": 0.3}), config_with()]
    assert finished(make_run(attempts=attempts)).changed == ("optim.lr",)


def test_more_epochs_change_a_cosine_schedule(make_run: MakeRun, config_with: Callable[..., Any]) -> None:
    cosine = {"optim.schedule": "cosine"}
    attempts = [config_with({**cosine, "train.epochs": 5}), config_with(cosine)]
    assert finished(make_run(cosine, attempts=attempts)).changed == ("train.epochs",)


def test_a_run_without_a_spool_is_read(make_run: MakeRun) -> None:
    path = make_run()
    (path / "events/events.jsonl").write_text('{"e": "start"\nnonsense "start"\n', encoding="utf-8")
    assert finished(path).changed == ()
    (path / "events/events.jsonl").unlink()
    assert finished(path).changed == ()


def test_runs_are_found_once_at_any_depth_outside_runs(make_run: MakeRun, tmp_path: Path) -> None:
    one = make_run(name="one")
    two = make_run(name="sweep/of/two")
    make_run(name="one/export/copy")
    make_run(name="mlartifacts/1/three")
    make_run(name=".hidden/four")
    (tmp_path / "runs/link").symlink_to(two)
    (tmp_path / "runs/report").mkdir()
    runs = find_runs([one, one], tmp_path / "runs")
    assert {path.resolve() for path in runs} == {one, two}
    assert len(runs) == 2
    assert find_runs([], one) == [one], "a run directory itself"


@pytest.mark.parametrize(
    ("named", "below", "field", "words"),
    [
        ([], None, "run", "no run directory was given"),
        (["gone"], None, "run", "is not a run directory"),
        (["empty"], None, "run", "is not a run directory"),
        ([], "empty", "--all", "contains no run directory"),
        ([], "gone", "--all", "is not a folder"),
    ],
)
def test_missing_runs_are_a_user_error(
    named: list[str], below: str | None, field: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=words) as caught:
        find_runs([tmp_path / name for name in named], None if below is None else tmp_path / below)
    assert caught.value.field == field
    assert caught.value.remedy
