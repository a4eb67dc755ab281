"""Figures of the assignment and the class vectors, drawn at the end of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from dl2pa.geometry.bounds import max_cosine_bound
from dl2pa.geometry.certificate import nearest_cosines
from dl2pa.geometry.plot import cosine_histogram
from dl2pa.methods import Method, PrototypeMethod
from dl2pa.reporting.artifacts import Artifacts
from dl2pa.reporting.class_metrics import Labels, cluster_order
from dl2pa.reporting.run_plots import BLUE, GREEN, INK, ORANGE, RED, label_axes, name_axes, new_figure, png
from dl2pa.training.finish import FinishedRun

log = logging.getLogger(__name__)

_MAX_CLASSES = 1000
"""Figures with one row per class are unreadable beyond this number."""
_MAX_NAMES = 60
_MAX_TICKS = 20
_BINS = 400


def draw_assignment_figures(art: Artifacts, finished: FinishedRun) -> None:
    """Draw the cosines of the class vectors and, of a learned assignment, its history."""
    method, records, classes = finished.method, finished.assignment_updates, finished.data.classes
    art.picture("prototype_cosines", lambda: draw_histogram(method))
    if len(classes) > _MAX_CLASSES:
        log.info("no figures with one row per class: %d classes are too many", len(classes))
        return
    art.picture("class_cosines", lambda: draw_matrices(method, classes))
    if isinstance(method, PrototypeMethod) and records:
        history = assignment_history(records, method.assignment.cpu().numpy())
        if history is None:
            log.info("no figure of the assignment: the records of %d updates are inconsistent", len(records))
        else:
            art.picture("assignment_flow", lambda: draw_flow(history, records, method, classes))


def assignment_history(records: Sequence[dict[str, Any]], final_c: Labels) -> Labels | None:
    """Reconstruct σ before the first update and after each, [updates + 1, C]; None if the moves are inconsistent."""
    history = [final_c.copy()]
    for record in reversed(records):
        sigma = history[-1].copy()
        for label, old, new in record["moves"]:
            if sigma[label] != new:
                return None
            sigma[label] = old
        history.append(sigma)
    return np.stack(history[::-1])


def draw_histogram(method: Method) -> bytes:
    """Plot histograms of cosines between class vectors, and of mean features with their class vectors.

    The mean features are those of the last assignment update. The panel shows a proven lower bound of the largest
    cosine of C vectors in d dimensions.
    """
    vectors, means = method.class_vectors().detach().cpu().double(), _class_means(method)
    bound = max_cosine_bound(*vectors.shape)
    nearest = nearest_cosines(vectors)
    counts, edges = cosine_histogram(vectors, _BINS).numpy(), np.linspace(-1.0, 1.0, _BINS + 1)
    figure = new_figure(5.6 if means is None else 10.0, 3.4)
    panels = figure.subplots(1, 1 if means is None else 2, squeeze=False)[0]
    shown = np.flatnonzero(counts)
    axes = panels[0]
    axes.stairs(counts, edges, fill=True, color=BLUE, alpha=0.85)
    axes.set_yscale("symlog")
    low, high = min(edges[shown[0]], bound) - 0.06, max(edges[shown[-1] + 1], bound) + 0.06
    axes.set(xlim=(max(-1.02, low), min(1.02, high)), ylim=(0, 12.0 * counts.max()))
    for value, color, linestyle, name in (
        (float(nearest.max()), RED, "-", "largest"),
        (bound, INK, "--", "lower bound of the largest"),
        (float(nearest.mean()), ORANGE, ":", "mean of the nearest"),
    ):
        axes.axvline(value, color=color, linewidth=1.2, linestyle=linestyle, label=f"{name} {value:.3f}")
    label_axes(axes, "Cosines between class vectors", "cosine", "pairs", legend="upper left")
    if means is not None:
        seen = means.abs().sum(dim=1).cpu().numpy() > 0
        _draw_mean_cosines(panels[1], (_unit_rows(means) * _unit_rows(vectors)).sum(axis=1)[seen])
    return png(figure)


def _draw_mean_cosines(axes: Any, to_mean_c: NDArray[np.float64]) -> None:
    middle = (float(np.max(to_mean_c)) + float(np.min(to_mean_c))) / 2
    # At least 0.01 wide: nearly equal values leave no room for bins.
    radius = max(float(np.ptp(to_mean_c)) / 2, 0.005)
    axes.hist(to_mean_c, bins=40, range=(middle - radius, middle + radius), color=GREEN, alpha=0.85)
    mean = float(np.mean(to_mean_c))
    axes.axvline(mean, color=INK, linewidth=1.2, linestyle="--", label=f"mean {mean:.3f}")
    title = "Cosines of mean features with their class vector"
    label_axes(axes, title, "cosine, at the last assignment update", "classes", legend="upper left")


def draw_matrices(method: Method, classes: Sequence[str]) -> bytes:
    """Plot cosines of the class vectors and of the mean features at the last update, similar classes adjacent."""
    panels, means = {"class vectors": _unit_rows(method.class_vectors())}, _class_means(method)
    if means is not None:
        panels = {"mean features at the last update": _unit_rows(means), **panels}
    order = _similarity_order(next(iter(panels.values())))
    figure = new_figure(6.5 * len(panels), 5.5)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, rows) in zip(grid, panels.items(), strict=True):
        cosines = (rows @ rows.T)[np.ix_(order, order)]
        image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        label_axes(axes, f"Cosines between {title}", "", "")
        name_axes(axes, [classes[int(c)] for c in order], _MAX_NAMES, 6)
    figure.colorbar(image, ax=figure.axes, shrink=0.8)  # pyright: ignore[reportPossiblyUnboundVariable]
    return png(figure)


def draw_flow(
    history: Labels, records: Sequence[dict[str, Any]], method: PrototypeMethod, classes: Sequence[str]
) -> bytes:
    """Plot the prototype of each label over the updates that moved labels; below, labels moved and margin."""
    order = _similarity_order(_unit_rows(method.prototypes))
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    epochs = [0.0, *(record["epoch"] for record in records)]
    moves = (history[1:] != history[:-1]).any(axis=1)
    columns = [0, *(np.flatnonzero(moves) + 1).tolist()]
    paths = position[history[columns]]
    moved_ever = (paths != paths[0]).any(axis=0)
    figure = new_figure(10, 8)
    flow, moved = figure.subplots(2, 1, height_ratios=[4, 1])
    for label in np.argsort(moved_ever, kind="stable"):
        color = f"C{label % 10}" if moved_ever[label] else "0.85"
        flow.plot(paths[:, label], color=color, linewidth=1.2 if len(classes) <= 100 else 0.4, alpha=0.8)
    shown = range(0, len(columns), 1 + len(columns) // _MAX_TICKS)
    flow.set_xticks(shown, [f"{epochs[columns[i]]:.4g}" for i in shown])
    title = f"Assignment of labels to prototypes: {int(moved_ever.sum())} of {len(classes)} labels moved"
    label_axes(flow, title, "epoch of each update that moved labels", "prototype, similar ones adjacent")
    if len(classes) <= _MAX_NAMES:
        by_position = np.argsort(paths[-1])
        flow.set_yticks(range(len(classes)), [classes[int(c)] for c in by_position], fontsize=6)
        flow.yaxis.tick_right()
    _draw_updates(moved, epochs[1:], records)
    return png(figure)


def _draw_updates(axes: Any, epochs: Sequence[float], records: Sequence[dict[str, Any]]) -> None:
    axes.plot(epochs, [record["moved"] for record in records], "k.-", linewidth=0.8, markersize=3)
    label_axes(axes, "", "epoch", "labels moved")
    margins = [record.get("margin") or np.nan for record in records]
    if np.isfinite(margins).any():
        right = axes.twinx()
        right.semilogy(epochs, margins, "C1.-", linewidth=0.8, markersize=3)
        right.set_ylabel("margin to the second best", fontsize=9, color="C1")


def _unit_rows(rows: torch.Tensor) -> NDArray[np.float64]:
    return F.normalize(rows.detach().cpu().double(), dim=1).numpy()


def _class_means(method: Method) -> torch.Tensor | None:
    """Mean features at the last assignment update, [C, d]; None without an update."""
    statistic = method.statistic if isinstance(method, PrototypeMethod) else None
    return statistic.rows if statistic is not None and statistic.rows.any() else None


def _similarity_order(rows_cd: NDArray[np.float64]) -> Labels:
    """Order rows by clustering their cosine distances."""
    distances = np.clip(1.0 - rows_cd @ rows_cd.T, 0.0, None)
    return cluster_order(0.5 * (distances + distances.T))
