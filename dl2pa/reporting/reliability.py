"""Reliability diagrams (DeGroot and Fienberg, The Statistician 1983; Guo et al., ICML 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dl2pa.reporting.class_metrics import Calibration
from dl2pa.reporting.run_plots import BLUE, GREEN, INK, RED, SOFT, label_axes, new_figure, png


def reliability_diagram(diagrams: Mapping[str, Calibration]) -> bytes:
    """Plot accuracy against confidence, one column per diagram; below, the number of images per bin.

    Bars show the accuracy of the bins, the hatched part its difference from their mean confidence, and the diagonal
    perfect calibration.

    Args:
        diagrams: by title, with equal numbers of bins.
    """
    figure = new_figure(0.6 + 4.6 * len(diagrams), 5.6)
    axes = figure.subplots(2, len(diagrams), height_ratios=[3, 1], sharex=True, sharey="row", squeeze=False)
    most = max(calibration.count.max() for calibration in diagrams.values())
    for column, (title, calibration) in enumerate(diagrams.items()):
        above, below = axes[:, column]
        _draw_bins(above, calibration)
        name = "accuracy" if column == 0 else ""
        label_axes(above, f"{title}: ECE {calibration.error:.2f} %", "", name, legend="best")
        above.get_legend().set_frame_on(True)
        above.get_legend().get_frame().set(edgecolor="none", alpha=0.85)
        _draw_counts(below, calibration, most)
        label_axes(below, "", "confidence of the prediction", "images" if column == 0 else "")
    return png(figure)


def _draw_bins(axes: Any, calibration: Calibration) -> None:
    """Draw accuracy bars, hatched differences and the diagonal."""
    filled, width = calibration.count > 0, 1.0 / len(calibration.count)
    left = (np.arange(len(calibration.count)) * width)[filled]
    accuracy, confidence = calibration.accuracy[filled], calibration.confidence[filled]
    bar: dict[str, Any] = {"width": width, "align": "edge"}
    axes.bar(left, accuracy, color=BLUE, edgecolor="white", label="accuracy", **bar)
    gap = confidence - accuracy
    for part, color, name in ((gap > 0, RED, "overconfident"), (gap < 0, GREEN, "underconfident")):
        if part.any():
            bottom, height = np.minimum(accuracy, confidence)[part], np.abs(gap)[part]
            style = {"facecolor": (1, 1, 1, 0.35), "edgecolor": color, "hatch": "////", "linewidth": 0.8}
            axes.bar(left[part], height, bottom=bottom, label=f"gap: {name}", **style, **bar)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="perfect calibration")
    axes.set_ylim(0, 1.01)


def _draw_counts(axes: Any, calibration: Calibration, most: int) -> None:
    """Draw the number of images per bin."""
    count, width = calibration.count, 1.0 / len(calibration.count)
    left = np.arange(len(count)) * width
    axes.bar(left, count, width=width, align="edge", color=SOFT, edgecolor="white")
    style = {"ha": "center", "va": "bottom", "fontsize": 6.5, "color": INK}
    for x, n in zip(left[count > 0].tolist(), count[count > 0].tolist(), strict=True):
        axes.annotate(f"{n:,}" if n < 10_000 else f"{n / 1000:.0f}k", (x + width / 2, n), **style)
    axes.set_yscale("symlog")
    axes.set_ylim(0, 4 * most)
    axes.set_xlim(0, 1)
