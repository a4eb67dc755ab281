from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dl2pa.methods import METHODS, LearnedEntry, Method, Targets
from dl2pa.reporting import assignment_figures
from dl2pa.reporting.artifacts import Artifacts
from dl2pa.reporting.assignment_figures import assignment_history, draw_assignment_figures
from dl2pa.rundir import RunDirectory


def record(*moves: tuple[int, int, int]) -> dict[str, Any]:
    return {"moves": [list(move) for move in moves]}


def test_the_assignment_history_is_reconstructed_from_the_moves() -> None:
    records = [record((0, 0, 1), (1, 1, 0)), record(), record((0, 1, 2), (2, 2, 1))]
    history = assignment_history(records, np.array([2, 0, 1]))
    assert history is not None
    assert history.tolist() == [[0, 1, 2], [1, 0, 2], [1, 0, 2], [2, 0, 1]]
    assert assignment_history(records, np.array([0, 1, 2])) is None
    assert assignment_history(records[:2], np.array([2, 0, 1])) is None


def trained(name: str = "dl2pa") -> tuple[Method, list[dict[str, Any]]]:
    """Build a method and update its assignment three times with permuted features."""
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


def draw(folder: Path, method: Method, records: list[dict[str, Any]]) -> list[Path]:
    """Draw the figures into a folder and return the files."""
    art = Artifacts(RunDirectory(folder))
    data = SimpleNamespace(classes=tuple(f"class {c}" for c in range(7)))
    finished = SimpleNamespace(method=method, assignment_updates=records, data=data)
    draw_assignment_figures(art, finished)  # type: ignore[arg-type]
    return [path for path, _ in art.made]


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
def test_figures_depend_on_the_method(name: str, files: list[str], tmp_path: Path) -> None:
    method, records = trained(name)
    made = draw(tmp_path, method, records)
    assert [path.name for path in made] == files
    assert all(is_png(path) for path in made)


def test_the_flow_figure_shows_the_assignment_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories: list[Any] = []
    monkeypatch.setattr(assignment_figures, "draw_flow", lambda history, *_: histories.append(history))
    method, records = trained()
    draw(tmp_path, method, records)
    assert histories[0][0].tolist() == list(range(7))
    assert histories[0][-1].tolist() == dict(method.named_buffers())["assignment"].tolist()
    assert len(histories[0]) == 4


@pytest.mark.parametrize("num_classes", [10, 100, 1000])
def test_many_labels_are_drawn_as_a_heat_map(num_classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(assignment_figures, "png", figures.append)
    first = np.arange(num_classes)
    late, settled = first.copy(), first.copy()
    late[[0, 1]], settled[:4] = [1, 0], [1, 0, 3, 2]
    points = F.normalize(torch.randn(num_classes, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    records = [{"epoch": 1.0, "moved": 2, "margin": 0.1}, {"epoch": 2.0, "moved": 2, "margin": 0.2}]
    method: Any = SimpleNamespace(prototypes=points)
    names = [f"class {c}" for c in range(num_classes)]
    assignment_figures.draw_flow(np.stack([first, late, settled]), records, method, names)
    flow, moved, margin = figures[0].axes[:3]
    assert f"4 of {num_classes} labels moved" in flow.get_title(loc="left")
    assert [bar.get_height() for bar in moved.patches] == [2, 2]
    assert margin.lines[0].get_ydata().tolist() == [0.1, 0.2]
    if num_classes <= 20:
        assert len(flow.lines) == num_classes and not flow.images
        return
    cosines = flow.images[0].get_array()
    assert cosines.shape == (num_classes, 3) and np.allclose(cosines[:, -1], 1.0)
    assert (cosines[:2, 1] < 0.999).all(), "the labels that moved last are on top"
    assert np.allclose(cosines[2:4, 1], 1.0) and (cosines[2:4, 0] < 0.999).all()


def test_inconsistent_records_only_leave_out_the_flow_figure(tmp_path: Path) -> None:
    method, records = trained()
    made = draw(tmp_path, method, records[:-1])
    assert [path.name for path in made] == ["prototype_cosines.png", "class_cosines.png"]


def test_too_many_classes_or_an_unwritable_folder_never_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    method, records = trained()
    (tmp_path / "pictures").write_text("")
    assert draw(tmp_path, method, records) == []
    assert "could not create class_cosines" in caplog.text
    monkeypatch.setattr(assignment_figures, "_MAX_CLASSES", 6)
    (tmp_path / "run").mkdir()
    made = draw(tmp_path / "run", method, records)
    assert [path.name for path in made] == ["prototype_cosines.png"]
