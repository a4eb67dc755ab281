"""Plots of a comparison: published and measured accuracy over d and by method."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dl2pa.reporting.run_plots import new_figure

Kind = Literal["published", "suspect", "ours", "short"]
METHODS = ("psc", "word2vec", "hpn", "ebv", "etf", "kasarla", "dnc", "goto", "dl2pa")
"""In the order of the published tables; a method has the same color in every plot."""
_COLORS = ("#4c4c57", "#a8761f", "#1f77b4", "#17a2a2", "#2f9e44", "#8c564b", "#9467bd", "#d6337c", "#d9480f")
_SIZE_FACTOR = 0.32
_NAMES: dict[Kind, str] = {
    "published": "published",
    "suspect": "published, suspect",
    "ours": "runs, best epoch, mean ± standard deviation",
    "short": "runs of another length",
}


@dataclass(frozen=True)
class Point:
    """One accuracy.

    Attributes:
        label: row in the plot by method: the method, numbered if it occurs several times.
        column: dimension, imbalance or backbone.
        std: None for a single run or a published figure.
    """

    method: str
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
    figure, axes = _figure(7.2, 4.2)
    for label in dict.fromkeys(p.label for p in points):
        for kind in _NAMES:
            line = sorted(
                (p for p in points if (p.label, p.kind) == (label, kind)), key=lambda p: float(p.column)
            )
            _draw(
                axes, line, [float(p.column) for p in line], [p.value for p in line], joined=kind != "short"
            )
        linked = [p for p in points if p.label == label and p.kind in ("published", "suspect")]
        linked.sort(key=lambda p: float(p.column))
        style = {"color": _color(label), "linestyle": "--", "linewidth": 1, "alpha": 0.6, "zorder": 1}
        axes.plot([p.column for p in linked], [p.value for p in linked], **style)
    axes.set_xscale("log")
    axes.set_xticks(columns, [f"{column:g}" for column in columns])
    axes.minorticks_off()
    axes.set_xlabel(name)
    axes.set_ylabel("top-1, %")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    _legends(figure, axes, points)
    return _svg(figure)


def by_method(points: Sequence[Point], name: str, title: str) -> bytes:
    """Plot the accuracy of each method, one panel per column."""
    columns = list(dict.fromkeys(p.column for p in points))
    labels = list(dict.fromkeys(p.label for p in points))[::-1]
    figure, panels = _figure(
        max(5.0, 2.4 * len(columns) + 1.2), _SIZE_FACTOR * len(labels) + 1.6, len(columns)
    )
    for axes, column in zip(panels if len(columns) > 1 else [panels], columns, strict=True):
        for point in (p for p in points if p.column == column):
            _draw(axes, [point], [point.value], [labels.index(point.label)], across=True)
        axes.set_title(f"{name} = {column}", fontsize=10)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(-0.6, len(labels) - 0.4)
        axes.set_xlabel("top-1, %")
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    _legends(figure, None, points)
    return _svg(figure)


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    figure = new_figure(width, height)
    return figure, figure.subplots(1, panels, sharey=True)


def _draw(
    axes: Any,
    line: Sequence[Point],
    x: Sequence[float],
    y: Sequence[float],
    *,
    joined: bool = False,
    across: bool = False,
) -> None:
    """Draw points of one method and kind, with error bars along the accuracy axis."""
    if not line:
        return
    kind, color = line[0].kind, _color(line[0].label)
    axes.plot(
        x, y, **{**_marks(kind), "color": color}, linestyle="-" if joined and kind == "ours" else "none"
    )
    spread = [(a, b, p.std) for a, b, p in zip(x, y, line, strict=True) if p.std is not None]
    if spread:
        at_x, at_y, std = zip(*spread, strict=True)
        error = {"xerr" if across else "yerr": std}
        axes.errorbar(at_x, at_y, **error, fmt="none", ecolor=color, capsize=3, linewidth=1.2)


def _marks(kind: Kind) -> dict[str, Any]:
    if kind == "ours":
        return {"marker": "o", "markersize": 6, "linewidth": 1.8, "zorder": 3}
    if kind == "short":
        return {"marker": "x", "markersize": 7, "markeredgewidth": 1.8, "zorder": 3}
    open_mark = {
        "marker": "o",
        "markersize": 7,
        "markerfacecolor": "white",
        "markeredgewidth": 1.4,
        "zorder": 2,
    }
    return {**open_mark, "marker": "s", "alpha": 0.45} if kind == "suspect" else open_mark


def _legends(figure: Any, axes: Any, points: Sequence[Point]) -> None:
    """Add a legend of the marks and, for a plot of lines, of the colors."""
    from matplotlib.lines import Line2D

    kinds: list[Kind] = [kind for kind in _NAMES if any(p.kind == kind for p in points)]
    marks = [Line2D([], [], color="#4c4c57", linestyle="none", **_marks(k), label=_NAMES[k]) for k in kinds]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    if axes is not None:
        labels = list(dict.fromkeys(p.label for p in points))
        lines = [Line2D([], [], color=_color(label), linewidth=3, label=label) for label in labels]
        figure.legend(handles=lines, loc="outside right upper", frameon=False, fontsize=8)


def _color(label: str) -> str:
    method = label.split()[0]
    return _COLORS[METHODS.index(method)] if method in METHODS else "#111111"


def _svg(figure: Any) -> bytes:
    """Save the figure as SVG without date and external references: equal points give equal bytes."""
    import matplotlib as mpl

    target = io.BytesIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with mpl.rc_context({"svg.hashsalt": "dl2pa"}):
        figure.savefig(target, format="svg", metadata=metadata)
    return re.sub(rb"<!DOCTYPE[^>]*>\s*", b"", target.getvalue())
