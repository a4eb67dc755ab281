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
_MAX_FLOW_LINES = 20
"""Labels that are drawn as one line each."""


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
    """Plot the assignment over the updates, above the number of labels that each update moved and its margin.

    Up to 20 classes, one line per label shows its prototype. With more, the rows of a heat map are the labels, those
    that settled last on top, and the color is the cosine of the prototype of a label with its final one.
    """
    margins = [record.get("margin") or np.nan for record in records]
    below = 2 if np.isfinite(margins).any() else 1
    with_lines = len(classes) <= _MAX_FLOW_LINES
    height = max(3.4, 0.24 * len(classes)) if with_lines else 4.6
    figure = new_figure(9.5, height + 1.5 * below)
    flow, *panels = figure.subplots(1 + below, 1, height_ratios=[height, *[1.4] * below], sharex=True)
    if with_lines:
        _draw_flow_lines(flow, history, method, classes)
    else:
        _draw_settling(figure, flow, history, method, classes)
    changed = int(_moves(history).any(axis=0).sum())
    title = f"Assignment of labels to prototypes: {changed} of {len(classes)} labels moved"
    label_axes(flow, title, "", flow.get_ylabel())
    updates = np.arange(1, len(records) + 1)
    _draw_moved(panels[0], updates, [record["moved"] for record in records])
    if below == 2:
        panels[1].semilogy(updates, margins, ".-", color=ORANGE, linewidth=0.8, markersize=3)
        label_axes(panels[1], "", "", "margin to the\nsecond best")
    _label_updates(panels[-1], [0.0, *(record["epoch"] for record in records)])
    return png(figure)


def _draw_moved(axes: Any, updates: Labels, moved: Sequence[int]) -> None:
    axes.bar(updates, moved, width=0.9, color=BLUE)
    if max(moved) > _MAX_FLOW_LINES:
        axes.set_yscale("symlog", linthresh=10)
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.yaxis.get_major_locator().set_params(integer=True)
    label_axes(axes, "", "", "labels moved")


def _draw_flow_lines(axes: Any, history: Labels, method: PrototypeMethod, classes: Sequence[str]) -> None:
    """Draw the prototype of each label after each update, similar prototypes adjacent; name the labels at the end."""
    order = _similarity_order(_unit_rows(method.prototypes))
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    paths = position[history]
    moved_ever = (paths != paths[0]).any(axis=0)
    for label in np.argsort(moved_ever, kind="stable"):
        style = {"color": f"C{label % 10}", "linewidth": 1.8} if moved_ever[label] else {"color": "0.75"}
        axes.plot(paths[:, label], **style)
    names = [classes[int(c)] for c in np.argsort(paths[-1])]
    axes.set_yticks(range(len(classes)), [_short(name) for name in names], fontsize=8)
    axes.yaxis.tick_right()
    axes.set_ylabel("prototype, similar ones adjacent")


def _draw_settling(
    figure: Any, axes: Any, history: Labels, method: PrototypeMethod, classes: Sequence[str]
) -> None:
    """Draw the cosine of the prototype of each label after each update with its final prototype."""
    vectors = _unit_rows(method.prototypes)
    cosines = np.stack([(vectors[sigma] * vectors[history[-1]]).sum(axis=1) for sigma in history], axis=1)
    last_moves = np.array([np.flatnonzero(row)[-1] if row.any() else -1 for row in _moves(history).T])
    order = np.argsort(-last_moves, kind="stable")
    extent = (-0.5, len(history) - 0.5, len(classes) - 0.5, -0.5)
    style = {"cmap": "viridis_r", "vmin": min(0.0, float(cosines.min())), "vmax": 1.0}
    image = axes.imshow(cosines[order], aspect="auto", extent=extent, interpolation="nearest", **style)
    figure.colorbar(image, ax=axes, pad=0.01).set_label("cosine with the final prototype", fontsize=8)
    if len(classes) <= _MAX_NAMES:
        axes.set_yticks(range(len(classes)), [_short(classes[int(c)]) for c in order], fontsize=6)
    else:
        axes.set_ylabel("labels, last to settle on top")


def _moves(history: Labels) -> NDArray[np.bool_]:
    """Whether each update moved each label, [updates, C]."""
    return history[1:] != history[:-1]


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"


def _label_updates(axes: Any, epochs: Sequence[float]) -> None:
    """Label the axis of the updates, the first of which is the initial assignment, with their epochs."""
    shown = range(0, len(epochs), 1 + (len(epochs) - 1) // _MAX_TICKS)
    axes.set_xticks(shown, [f"{epochs[i]:.0f}" if epochs[i] >= 10 else f"{epochs[i]:.2g}" for i in shown])
    axes.set_xlim(-0.5, len(epochs) - 0.5)
    axes.set_xlabel("epoch of each assignment update", fontsize=9)


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
