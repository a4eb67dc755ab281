"""Figures of one run as PNG: curves, calibration, confusion matrix and cosines."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dl2pa.reporting.class_metrics import Bin, Confusion, Labels

Curve = Sequence[tuple[float, float]]
INK, SOFT = "#1c1c22", "#8a8a96"
BLUE, ORANGE, GREEN, RED = "#1f6fb4", "#d9700f", "#2f8f57", "#c0392b"
_MAX_NAMES = 40
_MAX_CELLS, _MAX_CELL_TEXTS = 60, 25
"""Classes up to which the confusion matrix is drawn as cells, and with percentages."""


def curves(points: Mapping[str, Curve], steps_per_epoch: int, published: float | None = None) -> bytes | None:
    """Plot loss, accuracy, learning rate and step time over the epochs; None without points.

    Args:
        points: (step, value) per metric.
        published: published accuracy to compare with, percent.
    """
    from matplotlib.ticker import LogLocator

    panels = [panel for panel in _PANELS if any(points.get(name) for name, _, _ in panel[2])]
    if not panels:
        return None
    rows = (len(panels) + 1) // 2
    figure = new_figure(10.5, 2.9 * rows)
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, (title, unit, lines, log) in zip(grid, panels, strict=False):
        for name, label, color in lines:
            _draw_curve(axes, points.get(name) or (), steps_per_epoch, label, color)
        if title == "Accuracy":
            _mark_best(axes, points.get("val/top1") or (), steps_per_epoch)
            if published is not None:
                axes.axhline(published, color=SOFT, linestyle="--", linewidth=1.2)
                axes.annotate(
                    f"published {published:g}",
                    (0.99, published),
                    xycoords=("axes fraction", "data"),
                    ha="right",
                    va="bottom",
                    fontsize=8,
                    color=SOFT,
                )
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}" if unit == "ms" else "")
            if unit == "ms":
                axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
        axes.set_ylabel(unit, fontsize=9)
        axes.set_xlabel("epoch", fontsize=9)
        axes.legend(frameon=False, fontsize=8)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return _png(figure)


_PANELS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...], bool], ...] = (
    ("Training loss", "mean over the log interval", (("train/loss", "loss", BLUE),), False),
    (
        "Accuracy",
        "%",
        (("val/top1", "top-1", BLUE), ("val/top5", "top-5", GREEN), ("val/ece", "calibration error", RED)),
        False,
    ),
    (
        "Learning rate and gradient norm",
        "",
        (("train/lr", "learning rate", ORANGE), ("train/gradient_norm", "gradient norm", SOFT)),
        True,
    ),
    (
        "Step time",
        "ms",
        (
            ("time/step_ms_p50", "median", BLUE),
            ("time/step_ms_p90", "90 %", ORANGE),
            ("time/step_ms_p99", "99 %", RED),
        ),
        True,
    ),
)


def _draw_curve(axes: Any, curve: Curve, steps_per_epoch: int, label: str, color: str) -> None:
    shown = [(step / steps_per_epoch, value) for step, value in curve if np.isfinite(value)]
    if not shown:
        return
    x, y = zip(*shown, strict=True)
    few = {"marker": "o", "markersize": 3} if len(shown) <= 40 else {}
    axes.plot(x, y, color=color, label=label, linewidth=1.3, **few)


def best_point(curve: Curve) -> tuple[float, float]:
    """Return the point of the highest value, the first of equal ones."""
    return max(curve, key=lambda point: (point[1], -point[0]))


def _mark_best(axes: Any, curve: Curve, steps_per_epoch: int) -> None:
    if not curve:
        return
    step, best = best_point(curve)
    axes.plot([step / steps_per_epoch], [best], "o", markersize=8, markerfacecolor="none", color=INK)
    late = step > 0.6 * max(s for s, _ in curve)
    axes.annotate(
        f"best {best:.2f}",
        (step / steps_per_epoch, best),
        xytext=(-8 if late else 8, -14),
        textcoords="offset points",
        ha="right" if late else "left",
        fontsize=8,
        color=INK,
    )


def reliability_diagram(bins: Sequence[Bin], error: float) -> bytes:
    """Plot accuracy and confidence per bin; below, the number of images per bin."""
    figure = new_figure(5.6, 5.6)
    above, below = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    filled = [b for b in bins if b.accuracy is not None]
    width = bins[0].high - bins[0].low
    at = [b.low for b in filled]
    accuracy = np.array([b.accuracy for b in filled], dtype=float)
    confidence = np.array([b.confidence for b in filled], dtype=float)
    kwargs: dict[str, Any] = {"width": width, "align": "edge"}
    both = np.minimum(accuracy, confidence)
    above.bar(at, both, color=BLUE, edgecolor="white", label="accuracy", **kwargs)
    for part, color, name in (
        (confidence - accuracy, RED, "overconfident"),
        (accuracy - confidence, GREEN, "underconfident"),
    ):
        if (part > 0).any():
            height = np.clip(part, 0, None)
            above.bar(
                at, height, bottom=both, color=color, alpha=0.55, edgecolor="white", label=name, **kwargs
            )
    above.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--")
    above.set_ylabel("accuracy", fontsize=9)
    above.set_ylim(0, 1)
    above.set_title(
        f"Reliability diagram: calibration error {error:.2f} %", fontsize=10, loc="left", fontweight="bold"
    )
    above.legend(frameon=False, fontsize=8, loc="upper left")
    below.bar([b.low for b in bins], [b.count for b in bins], color=SOFT, edgecolor="white", **kwargs)
    for b in filled:
        text = f"{b.count:,}" if b.count < 10_000 else f"{b.count / 1000:.0f}k"
        below.annotate(text, (b.low + width / 2, b.count), ha="center", va="bottom", fontsize=6.5, color=INK)
    below.set_yscale("symlog")
    below.set_ylim(0, 4 * max(b.count for b in bins))
    below.set_ylabel("images", fontsize=9)
    below.set_xlabel("confidence of the prediction", fontsize=9)
    below.set_xlim(0, 1)
    return _png(figure)


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
    if c <= _MAX_CELLS:
        norms = ("Greens", Normalize(0, 110)), ("Oranges", LogNorm(least / 3, 100))
        images: list[Any] = []
        for part, (cmap, norm) in zip((hits, ~hits), norms, strict=True):
            cells = np.full((c, c), np.nan)
            cells[row[part], column[part]] = share[part]
            images.append(axes.imshow(cells, cmap=cmap, norm=norm))
        if c <= _MAX_CELL_TEXTS:
            _write_shares(axes, row, column, share)
    else:
        kwargs = {"s": max(3.0, min(12.0, (420.0 / c) ** 2 * 2.2)), "marker": "s", "linewidths": 0}
        norms = ("Greens", Normalize(0, 110)), ("Oranges", LogNorm(least / 6, 100))
        by_share = np.argsort(share, kind="stable")
        parts = by_share[hits[by_share]], by_share[~hits[by_share]]
        images = [
            axes.scatter(column[part], row[part], c=share[part], cmap=cmap, norm=norm, **kwargs)
            for part, (cmap, norm) in zip(parts, norms, strict=True)
        ]
        axes.set_xlim(-0.5, c - 0.5)
        axes.set_ylim(c - 0.5, -0.5)
        axes.set_aspect("equal")
    axes.tick_params(length=0)
    name_axes(axes, [names[int(i)] for i in order], _MAX_NAMES, 7)
    axes.set_xlabel("predicted class", fontsize=9)
    axes.set_ylabel("true class", fontsize=9)
    for image, name in zip(images[::-1], ("errors", "correct"), strict=True):
        bar = figure.colorbar(image, ax=axes, shrink=0.5, pad=0.02)
        bar.set_label(f"{name}: % of the true class", fontsize=8)
        bar.ax.yaxis.set_major_formatter("{x:g}")
    axes.set_title(
        f"Confusion matrix of {c:,} classes, often confused ones adjacent",
        fontsize=10,
        loc="left",
        fontweight="bold",
    )
    return _png(figure)


def _write_shares(axes: Any, rows: Labels, columns: Labels, share: NDArray[np.float64]) -> None:
    """Write the percentages into the cells, in white on dark ones."""
    for row, column, value in zip(rows, columns, share, strict=True):
        dark = value > (70 if row == column else 25)
        text = f"{value:.0f}" if value >= 1 else f"{value:.1f}"
        style = {"ha": "center", "va": "center", "fontsize": 7, "color": "white" if dark else INK}
        axes.text(column, row, text, **style)


def cosine_histogram(
    unit_cd: NDArray[np.float64], bound: float, to_mean_c: NDArray[np.float64] | None = None
) -> bytes:
    """Plot histograms of the cosines between class vectors and, if given, between mean features and class vectors.

    Args:
        unit_cd: class vectors.
        bound: proven lower bound of the largest cosine of C vectors in d dimensions.
        to_mean_c: cosine of the mean feature of each class with its class vector.
    """
    figure = new_figure(10.0 if to_mean_c is not None else 5.6, 3.4)
    panels = figure.subplots(1, 2 if to_mean_c is not None else 1, squeeze=False)[0]
    counts, edges, largest, nearest = _cosines(unit_cd)
    shown = np.flatnonzero(counts)
    axes = panels[0]
    axes.stairs(counts, edges, fill=True, color=BLUE, alpha=0.85)
    axes.set_yscale("symlog")
    pad = 0.06
    axes.set_xlim(
        max(-1.02, min(edges[shown[0]], bound) - pad), min(1.02, max(edges[shown[-1] + 1], bound) + pad)
    )
    axes.axvline(largest, color=RED, linewidth=1.2, label=f"largest {largest:.3f}")
    axes.axvline(
        bound, color=INK, linewidth=1.2, linestyle="--", label=f"lower bound of the largest {bound:.3f}"
    )
    axes.axvline(
        nearest, color=ORANGE, linewidth=1.2, linestyle=":", label=f"mean of the nearest {nearest:.3f}"
    )
    axes.set_title("Cosines between class vectors", fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel("cosine", fontsize=9)
    axes.set_ylabel("pairs", fontsize=9)
    axes.set_ylim(0, 12.0 * counts.max())
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    if to_mean_c is not None:
        right = panels[1]
        # At least 0.01 wide: nearly equal values leave no room for bins.
        middle, radius = (
            (float(np.max(to_mean_c)) + float(np.min(to_mean_c))) / 2,
            float(np.ptp(to_mean_c)) / 2,
        )
        radius = max(radius, 0.005)
        right.hist(to_mean_c, bins=40, range=(middle - radius, middle + radius), color=GREEN, alpha=0.85)
        mean = float(np.mean(to_mean_c))
        right.axvline(mean, color=INK, linewidth=1.2, linestyle="--", label=f"mean {mean:.3f}")
        right.set_title(
            "Cosines of mean features with their class vector", fontsize=10, loc="left", fontweight="bold"
        )
        right.set_xlabel("cosine, at the last assignment update", fontsize=9)
        right.set_ylabel("classes", fontsize=9)
        right.legend(frameon=False, fontsize=8, loc="upper left")
    return _png(figure)


def _cosines(unit_cd: NDArray[np.float64], block: int = 1000) -> tuple[Any, Any, float, float]:
    """Return histogram counts and edges of the cosines of all pairs of rows, their maximum and the mean row maximum.

    Works in blocks of rows, without a [C, C] matrix.
    """
    edges = np.linspace(-1.0, 1.0, 401)
    counts = np.zeros(400, dtype=np.int64)
    largest: list[NDArray[np.float64]] = []
    for start in range(0, len(unit_cd), block):
        cosines = np.clip(unit_cd[start : start + block] @ unit_cd.T, -1.0, 1.0)
        rows = np.arange(start, start + len(cosines))
        cosines[np.arange(len(cosines)), rows] = -2.0
        largest.append(cosines.max(axis=1))
        counts += np.histogram(cosines[np.arange(len(unit_cd))[None, :] > rows[:, None]], edges)[0]
    nearest = np.concatenate(largest)
    return counts, edges, float(nearest.max()), float(nearest.mean())


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


def _png(figure: Any) -> bytes:
    for axes in figure.axes:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.tick_params(labelsize=8)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()
