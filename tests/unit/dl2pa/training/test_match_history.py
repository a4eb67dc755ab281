"""Record of assignment updates in a run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dl2pa.assignment import MatchDiagnostics, Matching
from dl2pa.training.match_history import MatchHistory


def matching(*moves: tuple[int, int, int], seconds: float = 0.1) -> Matching:
    diagnostics = MatchDiagnostics(0.25, 0.8, 2, 0.1, None, None, seconds)
    return Matching(len(moves), moves, 1.0, 2.0, 0.5, 3, seconds, diagnostics)


def steps(log: MatchHistory) -> list[int]:
    return [record["step"] for record in log.records()]


@pytest.fixture
def log(tmp_path: Path) -> MatchHistory:
    return MatchHistory(tmp_path / "matchings.jsonl")


def test_a_record_contains_everything_but_times(log: MatchHistory) -> None:
    log.add(30, 1.5, matching((0, 0, 1), (1, 1, 0)))
    (record,) = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
    assert record == {
        "step": 30,
        "epoch": 1.5,
        "moved": 2,
        "objective_before": 1.0,
        "objective_after": 2.0,
        "own_cosine": 0.5,
        "classes_seen": 3,
        "margin": 0.25,
        "compactness": 0.8,
        "loosest_class": 2,
        "mean_cosine": 0.1,
        "largest_cosine": None,
        "closest_classes": None,
        "alignment": None,
        "moves": [[0, 0, 1], [1, 1, 0]],
    }


def test_a_repeated_step_replaces_its_record_and_later_ones(log: MatchHistory) -> None:
    for step in (10, 20, 30):
        log.add(step, step / 10, matching((0, 0, step)))
    log.add(20, 2.0, matching((0, 0, 98)))
    log.add(20, 2.0, matching((0, 0, 99)))
    assert steps(log) == [10, 20]
    assert log.records()[-1]["moves"] == [[0, 0, 99]]


def test_a_resumed_run_duplicates_no_record(log: MatchHistory) -> None:
    for step in (10, 20, 30):
        log.add(step, step / 10, matching((1, step, step + 1)))
    whole = log.path.read_bytes()
    for resumed_from, repeated in ((20, (30,)), (10, (20, 30)), (-1, (10, 20, 30)), (30, ())):
        again = MatchHistory(log.path)
        again.cut_after(resumed_from)
        for step in repeated:
            again.add(step, step / 10, matching((1, step, step + 1), seconds=9.0))
        assert log.path.read_bytes() == whole


def test_without_a_cut_no_record_is_duplicated(log: MatchHistory) -> None:
    for step in (10, 20, 30):
        log.add(step, step / 10, matching())
    MatchHistory(log.path).add(20, 2.0, matching())
    assert steps(log) == [10, 20]


def test_a_partially_written_line_is_removed(log: MatchHistory) -> None:
    log.add(10, 1.0, matching())
    whole = log.path.read_text(encoding="utf-8")
    log.path.write_text(whole + whole[: len(whole) // 2], encoding="utf-8")
    again = MatchHistory(log.path)
    assert steps(again) == [10]
    again.cut_after(10)
    again.add(20, 2.0, matching())
    assert steps(again) == [10, 20]
    assert len(log.path.read_text(encoding="utf-8").splitlines()) == 2


def test_without_updates_no_file_is_written(log: MatchHistory) -> None:
    log.cut_after(-1)
    assert not log.path.exists()
    assert log.records() == []


def test_a_path_that_is_not_writable_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MatchHistory(tmp_path / "absent" / "matchings.jsonl")
    log.add(10, 1.0, matching())
    log.add(20, 2.0, matching())
    assert len(caplog.records) == 1
    assert "assignment updates are not recorded" in caplog.text
