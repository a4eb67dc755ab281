"""Plot prototypes: a histogram of their pairwise cosines and, for d ≤ 3, the points on the sphere."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dl2pa.constructions import check_plot_file
from dl2pa.errors import UserError
from dl2pa.geometry.certificate import row_blocks
from dl2pa.geometry.prototypes import Prototypes
from dl2pa.osutil import replacing

_BINS = 200


def plot_prototypes(prototypes: Prototypes, path: str | Path) -> Path:
    """Write a plot and return its path.

    Args:
        prototypes: prototypes to plot.
        path: ends in .png, .pdf or .svg; missing folders are created.

    Raises:
        UserError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    check_plot_file(path)
    # Imported here because the import takes about a second and training does not need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = prototypes.points
    with_sphere = points.shape[1] <= 3
    figure: Any = Figure(figsize=(11.0 if with_sphere else 6.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    _draw_histogram(figure.add_subplot(1, 2 if with_sphere else 1, 1), prototypes)
    if with_sphere:
        _draw_sphere(figure, points)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120)
    except OSError as error:
        message = f"cannot be written ({error.strerror or error})"
        raise UserError("--plot", str(path), message, "Choose a folder that you can write to.") from error
    return path


def cosine_histogram(points: Tensor, bins: int = _BINS) -> Tensor:
    """Histogram of the cosines of all pairs i < j in equal bins over [−1, 1], int64 [bins]."""
    unit = points / torch.linalg.vector_norm(points, dim=1, keepdim=True)
    count = len(unit)
    counts = torch.zeros(bins, dtype=torch.float64)
    blocks = row_blocks(count, count)
    for first in blocks:
        block = unit[first : first + blocks.step]
        # Rounding can put the cosine of opposite points slightly below −1.
        within = (block @ block.T).clamp_(-1, 1)
        upper = torch.triu_indices(len(block), len(block), offset=1)
        counts += torch.histc(within[upper[0], upper[1]], bins, -1.0, 1.0)
        if first + blocks.step < count:
            counts += torch.histc((block @ unit[first + blocks.step :].T).clamp_(-1, 1), bins, -1.0, 1.0)
    return counts.long()


def _draw_histogram(axes: Any, prototypes: Prototypes) -> None:
    certificate = prototypes.certificate
    edges = torch.linspace(-1.0, 1.0, _BINS + 1).tolist()
    # The lines are behind the bars because in many codes the most frequent cosine is the largest.
    largest, bound = certificate.max_cosine, certificate.lower_bound
    axes.axvline(largest, color="C3", lw=1, zorder=1, label=f"largest {largest:.4f}")
    axes.axvline(bound, color="C0", lw=1, ls="--", zorder=1, label=f"lower bound {bound:.4f}")
    axes.stairs(cosine_histogram(prototypes.points).tolist(), edges, fill=True, color="0.25", zorder=2)
    axes.set(yscale="log", xlim=(-1.02, 1.02), xlabel="cosine", ylabel="pairs")
    axes.set_ylim(bottom=0.5)
    construction = textwrap.fill(certificate.construction, 70)
    axes.set_title(f"{certificate.num_classes} × {certificate.dim}\n{construction}", fontsize=9)
    axes.legend()


def _draw_sphere(figure: Any, points: Tensor) -> None:
    """Draw the points of R^1 and R^2 with a circle, those of R^3 with a wireframe sphere."""
    dim = points.shape[1]
    columns = [points[:, axis].tolist() if axis < dim else [0.0] * len(points) for axis in range(3)]
    if dim < 3:
        axes = figure.add_subplot(1, 2, 2)
        angles = torch.linspace(0.0, 2 * math.pi, 361)
        axes.plot(angles.cos().tolist(), angles.sin().tolist(), color="0.8")
        axes.scatter(columns[0], columns[1], s=20, color="C3", zorder=3)
        axes.set_aspect("equal")
        return
    axes = figure.add_subplot(1, 2, 2, projection="3d")
    azimuth, polar = torch.meshgrid(
        torch.linspace(0, 2 * math.pi, 37), torch.linspace(0, math.pi, 19), indexing="ij"
    )
    sphere = (azimuth.cos() * polar.sin(), azimuth.sin() * polar.sin(), polar.cos())
    axes.plot_wireframe(*(part.numpy() for part in sphere), color="0.85", linewidth=0.4)
    axes.scatter(*columns, s=20, color="C3", depthshade=True)
    axes.set_aspect("equal")
    axes.set_axis_off()
