"""Plots of a comparison: published and measured accuracy over d and by method."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dl2pa.reporting.run_plots import new_figure

Kind = Literal["published", "suspect", "measured", "short"]
_COLORS = {
    "psc": "#4c4c57",
    "word2vec": "#a8761f",
    "hpn": "#1f77b4",
    "ebv": "#17a2a2",
    "etf": "#2f9e44",
    "kasarla": "#8c564b",
    "dnc": "#9467bd",
    "goto": "#d6337c",
    "dl2pa": "#d9480f",
}
"""A method has the same color in every plot."""
_NAMES: dict[Kind, str] = {
    "published": "published",
    "suspect": "published, suspect",
    "measured": "runs, best epoch, mean ± standard deviation",
    "short": "runs of another length",
}
_OPEN = {"marker": "o", "markersize": 7, "markerfacecolor": "white", "markeredgewidth": 1.4, "zorder": 2}
_MARKS: dict[Kind, dict[str, Any]] = {
    "published": _OPEN,
    "suspect": {**_OPEN, "marker": "s", "alpha": 0.45},
    "measured": {"marker": "o", "markersize": 6, "linewidth": 1.8, "zorder": 3},
    "short": {"marker": "x", "markersize": 7, "markeredgewidth": 1.8, "zorder": 3},
}


@dataclass(frozen=True)
class Point:
    """One accuracy.

    Attributes:
        label: the method, numbered if it occurs several times.
        column: dimension, imbalance or backbone.
        std: None for a single run or a published figure.
    """

    label: str
    column: int | float | str
    value: float
    std: float | None
    kind: Kind


def over_columns(points: Sequence[Point], name: str, title: str) -> bytes | None:
    """Plot accuracy over d or imbalance, one line per method; None without two numeric columns."""
    columns = sorted({p.column for p in points if not isinstance(p.column, str)})
    if len(columns) < 2 or any(isinstance(p.column, str) for p in points):
        return None
    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    ordered = sorted(points, key=lambda p: float(p.column))
    for label in dict.fromkeys(p.label for p in points):
        for kind in _NAMES:
            line = [p for p in ordered if (p.label, p.kind) == (label, kind)]
            linestyle = "-" if kind == "measured" else "none"
            _draw(axes, line, [p.column for p in line], [p.value for p in line], "yerr", linestyle)
        linked = [p for p in ordered if p.label == label and p.kind in ("published", "suspect")]
        style = {"color": _color(label), "linestyle": "--", "linewidth": 1, "alpha": 0.6, "zorder": 1}
        axes.plot([p.column for p in linked], [p.value for p in linked], **style)
    axes.set_xscale("log")
    axes.set_xticks(columns, [f"{column:g}" for column in columns])
    axes.minorticks_off()
    axes.set_xlabel(name)
    axes.set_ylabel("top-1, %")
    axes.grid(axis="y", alpha=0.3)
    return _finish(figure, title, points, with_colors=True)


def by_method(points: Sequence[Point], name: str, title: str) -> bytes:
    """Plot the accuracy of each method, one panel per column."""
    columns = list(dict.fromkeys(p.column for p in points))
    labels = list(dict.fromkeys(p.label for p in points))[::-1]
    figure = new_figure(max(5.0, 2.4 * len(columns) + 1.2), 0.32 * len(labels) + 1.6)
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        for point in (p for p in points if p.column == column):
            _draw(axes, [point], [point.value], [labels.index(point.label)], "xerr", "none")
        axes.set_title(f"{name} = {column}", fontsize=10)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(-0.6, len(labels) - 0.4)
        axes.set_xlabel("top-1, %")
        axes.grid(axis="x", alpha=0.3)
    return _finish(figure, title, points, with_colors=False)


def _draw(
    axes: Any, line: Sequence[Point], x: Sequence[Any], y: Sequence[float], bars: str, linestyle: str
) -> None:
    """Draw points of one method and kind.

    Args:
        bars: `xerr` or `yerr`, the direction of the error bars.
    """
    if not line:
        return
    color = _color(line[0].label)
    axes.plot(x, y, **_MARKS[line[0].kind], color=color, linestyle=linestyle)
    spread = [(a, b, p.std) for a, b, p in zip(x, y, line, strict=True) if p.std is not None]
    if spread:
        at_x, at_y, std = zip(*spread, strict=True)
        axes.errorbar(at_x, at_y, **{bars: std}, fmt="none", ecolor=color, capsize=3, linewidth=1.2)


def _finish(figure: Any, title: str, points: Sequence[Point], *, with_colors: bool) -> bytes:
    """Add the title and legends of the marks and colors; save as SVG.

    The file has no date and no external references: equal points give equal bytes.
    """
    import matplotlib as mpl
    from matplotlib.lines import Line2D

    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    kinds: list[Kind] = [kind for kind in _NAMES if any(p.kind == kind for p in points)]
    marks = [Line2D([], [], color="#4c4c57", linestyle="none", **_MARKS[k], label=_NAMES[k]) for k in kinds]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    if with_colors:
        labels = dict.fromkeys(p.label for p in points)
        lines = [Line2D([], [], color=_color(label), linewidth=3, label=label) for label in labels]
        figure.legend(handles=lines, loc="outside right upper", frameon=False, fontsize=8)
    target = io.BytesIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with mpl.rc_context({"svg.hashsalt": "dl2pa"}):
        figure.savefig(target, format="svg", metadata=metadata)
    return re.sub(rb"<!DOCTYPE[^>]*>\s*", b"", target.getvalue())


def _color(label: str) -> str:
    return _COLORS.get(label.split()[0], "#111111")
