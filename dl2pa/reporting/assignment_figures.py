"""Pictures of the assignment, drawn once at the end of a run."""

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
from dl2pa.reporting.run_plots import cosine_histogram

log = logging.getLogger(__name__)

_MOST_CLASSES = 1000
"""More are not told apart in a picture of this size."""
_MOST_NAMES = 60
_MOST_TICKS = 20
Order = NDArray[np.int64]


def draw_assignment_figures(
    folder: Path, method: Method, records: Sequence[dict[str, Any]], classes: Sequence[str]
) -> list[Path]:
    """Draw what can be drawn; the files made. Never raises: a run does not fail for its pictures.

    Args:
        folder: made if absent.
        records: of `MatchingLog`.
        classes: names in label order.
    """
    made: list[Path] = []
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        folder.mkdir(exist_ok=True)
        made.append(draw_histogram(folder / "prototype_cosines.png", method))
        if len(classes) > _MOST_CLASSES:
            log.info("no pictures class by class: %d are too many for one", len(classes))
            return made
        made.append(draw_cosines(folder / "class_cosines.png", method, classes))
        if isinstance(method, PrototypeMethod) and records:
            history = assignments_over(records, method.assignment.cpu().numpy())
            if history is None:
                log.info("no picture of the assignment: %d matchings do not add up", len(records))
            else:
                made.append(draw_flow(folder / "assignment_flow.png", history, records, method, classes))
    except ImportError:
        log.info("no pictures: matplotlib is not installed")
    except Exception as error:
        log.warning("no more pictures: %s", error)
    return made


def assignments_over(records: Sequence[dict[str, Any]], final_c: Order) -> Order | None:
    """σ before the first matching and after each, [matchings + 1, C]; None where the moves do not lead to the end."""
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
    """How far apart the class vectors are, and how near the mean features were to them at the last matching."""
    vectors = _unit_rows(method.class_vectors())
    own = None
    if isinstance(method, PrototypeMethod) and method.statistic is not None and method.statistic.rows.any():
        means = method.statistic.rows
        seen = means.abs().sum(dim=1).cpu().numpy() > 0
        own = (_unit_rows(means) * vectors).sum(axis=1)[seen]
    path.write_bytes(cosine_histogram(vectors, max_cosine_bound(*vectors.shape), own))
    return path


def draw_cosines(path: Path, method: Method, classes: Sequence[str]) -> Path:
    """Cosines class by class: between the mean directions of the features at the last matching, where there was one,
    and between the class vectors in force; classes alike side by side."""
    from matplotlib.figure import Figure

    panels = {"class vectors": _unit_rows(method.class_vectors())}
    if isinstance(method, PrototypeMethod) and method.statistic is not None and method.statistic.rows.any():
        panels = {"mean features at the last matching": _unit_rows(method.statistic.rows), **panels}
    order = _alike_together(next(iter(panels.values())))
    figure = Figure(figsize=(6.5 * len(panels), 5.5), layout="constrained")
    for axes, (title, rows) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        cosines = (rows @ rows.T)[np.ix_(order, order)]
        shown = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axes.set_title(f"cosines between {title}", fontsize=10)
        _name(axes, [classes[int(c)] for c in order])
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
    """Each label's way from prototype to prototype, one column a matching that moved any; below, over all epochs, how
    many moved and by what margin."""
    from matplotlib.figure import Figure

    order = _alike_together(_unit_rows(method.prototypes))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    epochs = [0.0, *(record["epoch"] for record in records)]
    moves = (history[1:] != history[:-1]).any(axis=1)
    columns = [0, *(np.flatnonzero(moves) + 1).tolist()]
    ways = place[history[columns]]
    restless = (ways != ways[0]).any(axis=0)
    figure = Figure(figsize=(10, 8), layout="constrained")
    flow, moved = figure.subplots(2, 1, height_ratios=[4, 1])
    for label in np.argsort(restless, kind="stable"):
        color = f"C{label % 10}" if restless[label] else "0.85"
        flow.plot(ways[:, label], color=color, linewidth=1.2 if len(classes) <= 100 else 0.4, alpha=0.8)
    shown = range(0, len(columns), 1 + len(columns) // _MOST_TICKS)
    flow.set_xticks(shown, [f"{epochs[columns[i]]:.4g}" for i in shown])
    flow.set_xlabel("epoch of each matching that moved labels")
    flow.set_ylabel("prototype, neighbors together")
    flow.set_title(
        f"labels on prototypes: {int(restless.sum())} of {len(classes)} labels ever moved", fontsize=10
    )
    if len(classes) <= _MOST_NAMES:
        by_place = np.argsort(ways[-1])
        flow.set_yticks(range(len(classes)), [classes[int(c)] for c in by_place], fontsize=6)
        flow.yaxis.tick_right()
    _draw_matchings(moved, epochs[1:], records)
    figure.savefig(path, dpi=110)
    return path


def _draw_matchings(axes: Any, epochs: Sequence[float], records: Sequence[dict[str, Any]]) -> None:
    axes.plot(epochs, [record["moved"] for record in records], "k.-", linewidth=0.8, markersize=3)
    axes.set_ylabel("labels moved")
    axes.set_xlabel("epoch")
    margins = [record.get("margin") or np.nan for record in records]
    if np.isfinite(margins).any():
        beside = axes.twinx()
        beside.semilogy(epochs, margins, "C1.-", linewidth=0.8, markersize=3)
        beside.set_ylabel("margin to the second best", color="C1")


def _unit_rows(rows: torch.Tensor) -> NDArray[np.float64]:
    return F.normalize(rows.detach().cpu().double(), dim=1).numpy()


def _alike_together(rows_cd: NDArray[np.float64]) -> Order:
    """An order in which rows of large cosine are neighbors: the leaves of an average-linkage tree."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(rows_cd) < 3:
        return np.arange(len(rows_cd))
    distances = np.clip(1.0 - rows_cd @ rows_cd.T, 0.0, None)
    distances = 0.5 * (distances + distances.T)
    np.fill_diagonal(distances, 0.0)
    return np.asarray(leaves_list(linkage(squareform(distances, checks=False), "average")), dtype=np.int64)


def _name(axes: Any, names: Sequence[str]) -> None:
    if len(names) > _MOST_NAMES:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_xticks(range(len(names)), names, fontsize=6, rotation=90)
