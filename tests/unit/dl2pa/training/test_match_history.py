"""The record of matchings in a run directory, and the pictures made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dl2pa.assignment import MatchDiagnostics, Matching
from dl2pa.methods import METHODS, LearnedEntry, Method, Targets
from dl2pa.reporting import assignment_figures
from dl2pa.reporting.assignment_figures import assignments_over, draw_assignment_figures
from dl2pa.training.match_history import MatchHistory


def matching(*moves: tuple[int, int, int], seconds: float = 0.1) -> Matching:
    diagnostics = MatchDiagnostics(0.25, 0.8, 2, 0.1, None, None, seconds)
    return Matching(len(moves), moves, 1.0, 2.0, 0.5, 3, seconds, diagnostics)


def steps(log: MatchHistory) -> list[int]:
    return [record["step"] for record in log.records()]


@pytest.fixture
def log(tmp_path: Path) -> MatchHistory:
    return MatchHistory(tmp_path / "matchings.jsonl")


def test_a_record_tells_all_but_the_time_it_took(log: MatchHistory) -> None:
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
        "moves": [[0, 0, 1], [1, 1, 0]],
    }


def test_a_step_recorded_again_replaces_its_record_and_what_came_after(log: MatchHistory) -> None:
    for step in (10, 20, 30):
        log.add(step, step / 10, matching((0, 0, step)))
    log.add(20, 2.0, matching((0, 0, 98)))
    log.add(20, 2.0, matching((0, 0, 99)))
    assert steps(log) == [10, 20]
    assert log.records()[-1]["moves"] == [[0, 0, 99]]


def test_a_new_attempt_repeats_without_doubling(log: MatchHistory) -> None:
    for step in (10, 20, 30):
        log.add(step, step / 10, matching((1, step, step + 1)))
    whole = log.path.read_bytes()
    for resumed_from, repeated in ((20, (30,)), (10, (20, 30)), (-1, (10, 20, 30)), (30, ())):
        again = MatchHistory(log.path)
        again.cut_after(resumed_from)
        for step in repeated:
            again.add(step, step / 10, matching((1, step, step + 1), seconds=9.0))
        assert log.path.read_bytes() == whole


def test_an_attempt_that_forgot_to_cut_still_doubles_nothing(log: MatchHistory) -> None:
    for step in (10, 20, 30):
        log.add(step, step / 10, matching())
    MatchHistory(log.path).add(20, 2.0, matching())
    assert steps(log) == [10, 20]


def test_a_line_torn_by_a_kill_is_dropped(log: MatchHistory) -> None:
    log.add(10, 1.0, matching())
    whole = log.path.read_text(encoding="utf-8")
    log.path.write_text(whole + whole[: len(whole) // 2], encoding="utf-8")
    again = MatchHistory(log.path)
    assert steps(again) == [10]
    again.cut_after(10)
    again.add(20, 2.0, matching())
    assert steps(again) == [10, 20]
    assert len(log.path.read_text(encoding="utf-8").splitlines()) == 2


def test_without_matchings_there_is_no_file(log: MatchHistory) -> None:
    log.cut_after(-1)
    assert not log.path.exists()
    assert log.records() == []


def test_a_place_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MatchHistory(tmp_path / "absent" / "matchings.jsonl")
    log.add(10, 1.0, matching())
    log.add(20, 2.0, matching())
    assert len(caplog.records) == 1
    assert "matchings go unrecorded" in caplog.text


def record(*moves: tuple[int, int, int]) -> dict[str, Any]:
    return {"moves": [list(move) for move in moves]}


def test_the_way_of_the_labels_is_followed_back_from_the_end() -> None:
    records = [record((0, 0, 1), (1, 1, 0)), record(), record((0, 1, 2), (2, 2, 1))]
    history = assignments_over(records, np.array([2, 0, 1]))
    assert history is not None
    assert history.tolist() == [[0, 1, 2], [1, 0, 2], [1, 0, 2], [2, 0, 1]]
    assert assignments_over(records, np.array([0, 1, 2])) is None
    assert assignments_over(records[:2], np.array([2, 0, 1])) is None


def trained(name: str = "dl2pa") -> tuple[Method, list[dict[str, Any]]]:
    """A method after three matchings of features that stand elsewhere each time."""
    torch.manual_seed(0)
    entry, records = METHODS[name], []
    if isinstance(entry, LearnedEntry):
        return entry.build(7, 4, entry.options()), records
    points = F.normalize(torch.randn(7, 4), dim=1)
    method = entry.build(points, entry.options(), None)
    for number in range(3):
        method.observe(points[torch.randperm(7)], Targets(torch.arange(7)))
        result = method.rematch()
        if result is not None:
            records.append(
                {"epoch": number + 1.0, "moved": result.moved, "moves": result.moves, "margin": 0.1}
            )
    return method, records


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("dl2pa", ["prototype_cosines.png", "class_cosines.png", "assignment_flow.png"]),
        ("hpn", ["prototype_cosines.png", "class_cosines.png"]),
        ("dnc", ["prototype_cosines.png", "class_cosines.png"]),
    ],
)
def test_pictures_are_drawn_of_what_there_is(name: str, files: list[str], tmp_path: Path) -> None:
    method, records = trained(name)
    made = draw_assignment_figures(tmp_path / "pictures", method, records, [f"class {c}" for c in range(7)])
    assert [path.name for path in made] == files
    assert all(is_png(path) for path in made)


def test_the_flow_drawn_is_the_labels_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        assignment_figures, "draw_flow", lambda path, history, *_: seen.append(history) or path
    )
    method, records = trained()
    draw_assignment_figures(tmp_path, method, records, ["x"] * 7)
    assert seen[0][0].tolist() == list(range(7))
    assert seen[0][-1].tolist() == dict(method.named_buffers())["assignment"].tolist()
    assert len(seen[0]) == 4


def test_matchings_that_do_not_add_up_cost_their_picture_only(tmp_path: Path) -> None:
    method, records = trained()
    made = draw_assignment_figures(tmp_path, method, records[:-1], ["x"] * 7)
    assert [path.name for path in made] == ["prototype_cosines.png", "class_cosines.png"]


def test_too_many_classes_or_a_place_that_is_taken_cost_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    method, records = trained()
    (tmp_path / "file").write_text("")
    assert draw_assignment_figures(tmp_path / "file", method, records, ["x"] * 7) == []
    assert "no more pictures" in caplog.text
    monkeypatch.setattr(assignment_figures, "_MOST_CLASSES", 6)
    made = draw_assignment_figures(tmp_path / "pictures", method, records, ["x"] * 7)
    assert [path.name for path in made] == ["prototype_cosines.png"], "a histogram is readable for any number"
