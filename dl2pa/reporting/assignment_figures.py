"""Figures of the assignment and the class vectors, drawn at the end of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from dl2pa.geometry.bounds import max_cosine_bound
from dl2pa.methods import Method, PrototypeMethod
from dl2pa.reporting.class_metrics import cluster_order
from dl2pa.reporting.run_plots import cosine_histogram, name_axes, new_figure
from dl2pa.rundir import RunDirectory

log = logging.getLogger(__name__)

_MAX_CLASSES = 1000
"""Figures with one row per class are unreadable beyond this number."""
_MAX_NAMES = 60
_MAX_TICKS = 20
Order = NDArray[np.int64]


def draw_assignment_figures(
    run: RunDirectory, method: Method, records: Sequence[dict[str, Any]], classes: Sequence[str]
) -> list[Path]:
    """Draw the figures into the run directory and return the files. Failures only log a warning.

    Args:
        records: from `MatchHistory.records`.
        classes: names in label order.
    """
    made: list[Path] = []
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        run.pictures.mkdir(exist_ok=True)
        made.append(draw_histogram(run.picture("prototype_cosines"), method))
        if len(classes) > _MAX_CLASSES:
            log.info("no figures with one row per class: %d classes are too many", len(classes))
            return made
        made.append(draw_cosines(run.picture("class_cosines"), method, classes))
        if isinstance(method, PrototypeMethod) and records:
            history = assignment_history(records, method.assignment.cpu().numpy())
            if history is None:
                log.info(
                    "no figure of the assignment: the records of %d updates are inconsistent", len(records)
                )
            else:
                made.append(draw_flow(run.picture("assignment_flow"), history, records, method, classes))
    except ImportError:
        log.info("no figures: matplotlib is not installed")
    except Exception as error:
        log.warning("could not draw the remaining assignment figures: %s", error)
    return made


def assignment_history(records: Sequence[dict[str, Any]], final_c: Order) -> Order | None:
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


def draw_histogram(path: Path, method: Method) -> Path:
    """Cosines between class vectors, and of mean features with their class vectors at the last update."""
    vectors = _unit_rows(method.class_vectors())
    to_mean = None
    if isinstance(method, PrototypeMethod) and method.statistic is not None and method.statistic.rows.any():
        means = method.statistic.rows
        seen = means.abs().sum(dim=1).cpu().numpy() > 0
        to_mean = (_unit_rows(means) * vectors).sum(axis=1)[seen]
    path.write_bytes(cosine_histogram(vectors, max_cosine_bound(*vectors.shape), to_mean))
    return path


def draw_cosines(path: Path, method: Method, classes: Sequence[str]) -> Path:
    """Cosine matrices of the class vectors and of the mean features at the last update, similar classes adjacent."""
    panels = {"class vectors": _unit_rows(method.class_vectors())}
    if isinstance(method, PrototypeMethod) and method.statistic is not None and method.statistic.rows.any():
        panels = {"mean features at the last update": _unit_rows(method.statistic.rows), **panels}
    order = _similarity_order(next(iter(panels.values())))
    figure = new_figure(6.5 * len(panels), 5.5)
    for axes, (title, rows) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        cosines = (rows @ rows.T)[np.ix_(order, order)]
        shown = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axes.set_title(f"cosines between {title}", fontsize=10)
        name_axes(axes, [classes[int(c)] for c in order], _MAX_NAMES, 6)
    figure.colorbar(shown, ax=figure.axes, shrink=0.8)  # pyright: ignore[reportPossiblyUnboundVariable]
    figure.savefig(path, dpi=110)
    return path


def draw_flow(
    path: Path,
    history: Order,
    records: Sequence[dict[str, Any]],
    method: PrototypeMethod,
    classes: Sequence[str],
) -> Path:
    """Prototype of each label over the updates that moved labels; below, the labels moved and the margin per update."""
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
    flow.set_xlabel("epoch of each update that moved labels")
    flow.set_ylabel("prototype, similar ones adjacent")
    flow.set_title(
        f"assignment of labels to prototypes: {int(moved_ever.sum())} of {len(classes)} labels moved",
        fontsize=10,
    )
    if len(classes) <= _MAX_NAMES:
        by_position = np.argsort(paths[-1])
        flow.set_yticks(range(len(classes)), [classes[int(c)] for c in by_position], fontsize=6)
        flow.yaxis.tick_right()
    _draw_updates(moved, epochs[1:], records)
    figure.savefig(path, dpi=110)
    return path


def _draw_updates(axes: Any, epochs: Sequence[float], records: Sequence[dict[str, Any]]) -> None:
    axes.plot(epochs, [record["moved"] for record in records], "k.-", linewidth=0.8, markersize=3)
    axes.set_ylabel("labels moved")
    axes.set_xlabel("epoch")
    margins = [record.get("margin") or np.nan for record in records]
    if np.isfinite(margins).any():
        right = axes.twinx()
        right.semilogy(epochs, margins, "C1.-", linewidth=0.8, markersize=3)
        right.set_ylabel("margin to the second best", color="C1")


def _unit_rows(rows: torch.Tensor) -> NDArray[np.float64]:
    return F.normalize(rows.detach().cpu().double(), dim=1).numpy()


def _similarity_order(rows_cd: NDArray[np.float64]) -> Order:
    """Order rows by clustering their cosine distances."""
    distances = np.clip(1.0 - rows_cd @ rows_cd.T, 0.0, None)
    return cluster_order(0.5 * (distances + distances.T))
