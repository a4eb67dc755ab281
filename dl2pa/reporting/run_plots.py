"""Figures of one run as PNG: curves, calibration and confusion matrix."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dl2pa.reporting.class_metrics import Confusion, Labels
from dl2pa.terms import term

Curve = Sequence[tuple[float, float]]
INK, SOFT = "#1c1c22", "#8a8a96"
BLUE, ORANGE, GREEN, RED = "#1f6fb4", "#d9700f", "#2f8f57", "#c0392b"
_MAX_NAMES = 40
_MAX_CELLS, _MAX_CELL_TEXTS = 60, 25
"""Classes up to which the confusion matrix is drawn as cells, and with percentages."""

_ACCURACY = "Accuracy"
_PANELS: tuple[tuple[str, str, dict[str, tuple[str, str]], bool], ...] = (
    ("Training loss", "mean over the log interval", {"train/loss": ("loss", BLUE)}, False),
    (_ACCURACY, "%", {"val/top1": ("top-1", BLUE), "val/top5": ("top-5", GREEN)}, False),
    ("Calibration error (ECE), raw", "%", {"val/ece": (term("ece"), RED)}, False),
    ("Learning rate", "", {"train/lr": ("learning rate", ORANGE)}, True),
    ("Gradient norm", "", {"train/gradient_norm": ("gradient norm", SOFT)}, True),
    (
        "Step time",
        "ms",
        {
            "time/step_ms_p50": ("median", BLUE),
            "time/step_ms_p90": ("90 %", ORANGE),
            "time/step_ms_p99": ("99 %", RED),
        },
        True,
    ),
)
"""Title, unit, label and color by metric, and whether the axis is logarithmic."""


def curves(points: Mapping[str, Curve], steps_per_epoch: int, published: float | None) -> bytes | None:
    """Plot loss, accuracy, calibration, learning rate, gradient norm and step time over the epochs.

    Args:
        points: (step, value) per metric.
        published: published accuracy to compare with, percent.

    Returns:
        A PNG; None without points.
    """
    panels = _panels(points)
    if not panels:
        return None
    rows = (len(panels) + 1) // 2
    figure = new_figure(10.5, 2.9 * rows)
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        _draw_panel(axes, panel, points, steps_per_epoch, published)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return png(figure)


def curve_panels(
    points: Mapping[str, Curve], steps_per_epoch: int, published: float | None
) -> list[tuple[str, bytes]]:
    """Plot the panels of `curves` as separate figures; return their titles and PNGs."""
    drawn: list[tuple[str, bytes]] = []
    for panel in _panels(points):
        figure = new_figure(5.2, 2.9)
        _draw_panel(figure.subplots(), panel, points, steps_per_epoch, published)
        drawn.append((panel[0], png(figure)))
    return drawn


def _panels(points: Mapping[str, Curve]) -> list[Any]:
    return [panel for panel in _PANELS if any(points.get(name) for name in panel[2])]


def _draw_panel(
    axes: Any, panel: Any, points: Mapping[str, Curve], steps_per_epoch: int, published: float | None
) -> None:
    """Draw one entry of `_PANELS`."""
    from matplotlib.ticker import MaxNLocator

    title, unit, lines, log = panel
    for name, (label, color) in lines.items():
        _draw_curve(axes, points.get(name) or (), steps_per_epoch, label, color)
    if title == _ACCURACY:
        _mark_best(axes, points.get("val/top1") or (), steps_per_epoch)
        if published is not None:
            axes.axhline(published, color=SOFT, linestyle="--", linewidth=1.2)
            where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
            axes.annotate(f"published {published:g}", (0.99, published), fontsize=8, color=SOFT, **where)
    if log:
        _scale_log(axes, with_minor_labels=unit == "ms")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_axes(axes, title, "epoch", unit, legend="best" if len(lines) > 1 else None)


def _scale_log(axes: Any, *, with_minor_labels: bool) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if with_minor_labels else "")
    if with_minor_labels:
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))


def _draw_curve(axes: Any, curve: Curve, steps_per_epoch: int, label: str, color: str) -> None:
    shown = [(step / steps_per_epoch, value) for step, value in curve if np.isfinite(value)]
    if not shown:
        return
    few = {"marker": "o", "markersize": 3} if len(shown) <= 40 else {}
    axes.plot(*zip(*shown, strict=True), color=color, label=label, linewidth=1.3, **few)


def best_point(curve: Curve) -> tuple[float, float]:
    """Return the point of the highest value, the first of equal ones."""
    return max(curve, key=lambda point: (point[1], -point[0]))


def _mark_best(axes: Any, curve: Curve, steps_per_epoch: int) -> None:
    if not curve:
        return
    step, best = best_point(curve)
    at = (step / steps_per_epoch, best)
    axes.plot(*at, "o", markersize=8, markerfacecolor="none", color=INK)
    offset, ha = (-8, "right") if step > 0.6 * max(s for s, _ in curve) else (8, "left")
    where = {"xytext": (offset, -14), "textcoords": "offset points", "ha": ha}
    axes.annotate(f"best {best:.2f}", at, fontsize=8, color=INK, **where)


def confusion_picture(confusion: Confusion, order: Labels, names: Sequence[str]) -> bytes:
    """Plot the confusion matrix by share of the true class, with correct predictions and errors in two colors.

    With many classes an error is drawn larger than its cell, so that single errors are visible.

    Args:
        order: classes in the order of rows and columns.
    """
    from matplotlib.colors import LogNorm, Normalize

    c = confusion.num_classes
    position = np.empty(c, dtype=np.int64)
    position[order] = np.arange(c)
    row, column = position[confusion.true], position[confusion.predicted]
    share, hits = 100.0 * confusion.share(), confusion.true == confusion.predicted
    least = max(0.05, float(share[~hits].min()) if (~hits).any() else 1.0)
    figure = new_figure(8.6, 7.2)
    axes = figure.subplots()
    norms = Normalize(0, 110), LogNorm(least / (3 if c <= _MAX_CELLS else 6), 100)
    by_share = np.argsort(share, kind="stable")
    size = max(3.0, min(12.0, (420.0 / c) ** 2 * 2.2))
    images: list[Any] = []
    for part, cmap, norm in zip((hits, ~hits), ("Greens", "Oranges"), norms, strict=True):
        if c <= _MAX_CELLS:
            cells = np.full((c, c), np.nan)
            cells[row[part], column[part]] = share[part]
            images.append(axes.imshow(cells, cmap=cmap, norm=norm))
        else:
            at = by_share[part[by_share]]
            style = {"s": size, "marker": "s", "linewidths": 0, "cmap": cmap, "norm": norm}
            images.append(axes.scatter(column[at], row[at], c=share[at], **style))
    axes.set(xlim=(-0.5, c - 0.5), ylim=(c - 0.5, -0.5), aspect="equal")
    if c <= _MAX_CELL_TEXTS:
        _write_shares(axes, row, column, share)
    axes.tick_params(length=0)
    name_axes(axes, [names[int(i)] for i in order], _MAX_NAMES, 7)
    for image, name in zip(images[::-1], ("errors", "correct"), strict=True):
        bar = figure.colorbar(image, ax=axes, shrink=0.5, pad=0.02)
        bar.set_label(f"{name}: % of the true class", fontsize=8)
        bar.ax.yaxis.set_major_formatter("{x:g}")
        bar.ax.tick_params(labelsize=8)
    title = f"Confusion matrix of {c:,} classes, often confused ones adjacent"
    label_axes(axes, title, "predicted class", "true class")
    return png(figure)


def _write_shares(axes: Any, rows: Labels, columns: Labels, share: NDArray[np.float64]) -> None:
    """Write the percentages into the cells, in white on dark ones."""
    for row, column, value in zip(rows, columns, share, strict=True):
        dark = value > (70 if row == column else 25)
        text = f"{value:.0f}" if value >= 1 else f"{value:.1f}"
        style = {"ha": "center", "va": "center", "fontsize": 7, "color": "white" if dark else INK}
        axes.text(column, row, text, **style)


def label_axes(axes: Any, title: str, x: str, y: str, *, legend: str | None = None) -> None:
    """Set the title, the labels and the style of axes; `legend` is the place of the legend."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    if legend is not None:
        axes.legend(frameon=False, fontsize=8, loc=legend)


def name_axes(axes: Any, names: Sequence[str], limit: int, fontsize: float) -> None:
    """Label rows and columns of a matrix; no labels beyond `limit` names."""
    if len(names) > limit:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    short = [name if len(name) <= 22 else name[:21] + "…" for name in names]
    axes.set_yticks(range(len(names)), short, fontsize=fontsize)
    axes.set_xticks(range(len(names)), short, fontsize=fontsize, rotation=90)


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of a size in inches; matplotlib is imported on first use."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Any) -> bytes:
    """Encode the figure as PNG."""
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()
