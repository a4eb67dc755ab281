"""Prototype constructions and files, as far as they can be checked without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from dl2pa.errors import UserError

Construction = Literal[
    "auto",
    "simplex",
    "blocks",
    "polygon",
    "known",
    "max_cosine",
    "uniformity",
    "hpn",
    "ebv",
    "kasarla",
    "etf",
]
CONSTRUCTIONS: tuple[Construction, ...] = get_args(Construction)
READ_SUFFIXES = (".safetensors", ".npy", ".pth", ".pt")
"""Suffixes of prototype files that can be read."""
WRITTEN_SUFFIXES = (".safetensors", ".npy")
"""Suffixes of prototype files that can be written."""
PLOT_SUFFIXES = (".png", ".pdf", ".svg")
"""Suffixes of plots of prototypes."""


def check_shape(num_classes: int, dim: int) -> None:
    """Raise a UserError unless C distinct unit vectors exist in R^d and C ≥ 2."""
    if num_classes < 2:
        raise UserError("num_classes", num_classes, "must be at least 2", "Give 2 or more.")
    if dim < 1:
        raise UserError("dim", dim, "must be at least 1", "Give 1 or more.")
    if dim == 1 and num_classes > 2:
        message = f"must be at least 2 for {num_classes} classes, because the sphere of R^1 has only 2 points"
        raise UserError("dim", dim, message, "Choose dim >= 2.")


def closed_form(num_classes: int, dim: int) -> Construction | None:
    """Name of the closed form that is optimal for C×d; None if there is none."""
    if num_classes <= dim + 1:
        return "simplex"
    if num_classes <= 2 * dim:
        return "blocks"
    return "polygon" if dim == 2 else None


def condition_of(construction: str, num_classes: int, dim: int) -> tuple[bool, str]:
    """Whether C and d satisfy the condition of a construction, and the condition as text. `known` needs torch."""
    conditions = {
        "simplex": (dim >= num_classes - 1, "dim >= num_classes - 1"),
        "blocks": (dim < num_classes <= 2 * dim, "dim < num_classes <= 2 * dim"),
        "polygon": (dim == 2, "dim = 2"),
        "kasarla": (dim >= num_classes - 1, "dim >= num_classes - 1"),
        "etf": (dim >= num_classes, "dim >= num_classes"),
        "auto": (True, ""),
        "known": (True, ""),
    }
    return conditions.get(construction, (dim >= 2, "dim >= 2"))


def check_defined(construction: str, num_classes: int, dim: int) -> None:
    """Raise a UserError unless a construction is defined for C×d, as far as this is known without torch."""
    check_shape(num_classes, dim)
    defined, condition = condition_of(construction, num_classes, dim)
    if not defined:
        raise undefined(construction, condition, num_classes, dim)


def undefined(construction: str, condition: str, num_classes: int, dim: int) -> UserError:
    """Error of a construction whose condition is not satisfied."""
    message = f"requires {condition}; got num_classes = {num_classes}, dim = {dim}"
    default = closed_form(num_classes, dim) or "max_cosine or known"
    remedy = f"Choose auto (here: {default}), or a dim that satisfies the condition."
    return UserError("method.prototypes", construction, message, remedy)


def check_prototype_file(path: Path, num_classes: int, dim: int) -> None:
    """Check suffix, presence, header and shape of a prototype file; its content is checked when it is loaded.

    Raises:
        UserError: with the path as the field.
    """
    check_shape(num_classes, dim)
    if path.suffix not in READ_SUFFIXES:
        remedy = "Use .safetensors, .npy, or the authors' .pth."
        raise UserError(str(path), path.suffix, "prototypes cannot be read from this format", remedy)
    if not path.is_file():
        raise UserError(str(path), path.name, "no such file", "Check the path.")
    shape = _shape_of(path)
    if shape is not None:
        check_points_shape(shape, path, num_classes, dim)


def check_points_shape(shape: tuple[int, ...], path: Path, num_classes: int, dim: int) -> None:
    """Raise a UserError unless the array in a prototype file has the shape (C, d)."""
    if shape == (num_classes, dim):
        return
    message = f"expected {num_classes} prototypes of {dim} dimensions, shape ({num_classes}, {dim})"
    remedy = "Use a file created for these num_classes and dim, or change them."
    if shape == (dim, num_classes):
        remedy = "The array looks transposed: save one prototype per row."
    raise UserError(str(path), str(shape), message, remedy)


def _shape_of(path: Path) -> tuple[int, ...] | None:
    """Shape of the array in a .npy file; None for other files and damaged ones, which loading reports."""
    if path.suffix != ".npy":
        return None
    import numpy as np

    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).shape
    except Exception:  # a damaged header can raise almost anything
        return None


def check_written_file(path: Path, field: str = "path") -> None:
    """Raise a UserError for `field` unless prototypes can be written to a file of this name."""
    if path.suffix not in WRITTEN_SUFFIXES:
        message = "prototypes cannot be written in this format"
        raise UserError(field, str(path), message, "Use .safetensors or .npy.")


def check_plot_file(path: Path) -> None:
    """Raise a UserError unless a plot can be written to a file of this name."""
    if path.suffix not in PLOT_SUFFIXES:
        raise UserError(
            "--plot", path.name, "unknown image format", f"Use one of {', '.join(PLOT_SUFFIXES)}."
        )
