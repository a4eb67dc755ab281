"""Reliability diagrams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dl2pa.reporting import reliability
from dl2pa.reporting.class_metrics import Calibration


def test_bars_are_accuracies_and_gaps_are_hatched(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = np.array([0.3, np.nan, 0.9])
    before = Calibration(np.array([10, 0, 30]), np.array([0.2, np.nan, 0.95]), accuracy, 6.25)
    after = Calibration(np.array([4, 0, 36]), np.array([0.3, np.nan, 0.9]), accuracy, 0.0)
    figures: list[Any] = []

    def capture(figure: Any) -> bytes:
        figures.append(figure)
        return b"png"

    monkeypatch.setattr(reliability, "png", capture)
    assert reliability.reliability_diagram({"Before": before, "After": after}) == b"png"
    (figure,) = figures
    for axes, calibration in zip(figure.axes[:2], (before, after), strict=True):
        bars = [bar for bar in axes.patches if not bar.get_hatch()]
        assert [bar.get_height() for bar in bars] == [0.3, 0.9]
        gaps = [(bar.get_y(), bar.get_height()) for bar in axes.patches if bar.get_hatch()]
        expected = [(0.9, 0.05), (0.2, 0.1)] if calibration is before else []  # overconfident bins first
        assert gaps == [pytest.approx(gap) for gap in expected]
        assert axes.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]]
    assert [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes[:2]] == [
        "Before: ECE 6.25 %",
        "After: ECE 0.00 %",
    ]
