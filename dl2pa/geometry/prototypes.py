"""Prototypes with their certificate, and the choice of how to make them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from dl2pa.errors import UserError
from dl2pa.geometry import objectives, simplex
from dl2pa.geometry.certificate import Certificate, certify
from dl2pa.geometry.known import best_combination
from dl2pa.geometry.optimize import Progress, minimize_max_cosine, threads_for
from dl2pa.geometry.search import best_found, best_known

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

_Optimizer = Callable[[int, int, int, Progress | None], Tensor]
_OPTIMIZERS: dict[str, _Optimizer] = {
    "max_cosine": minimize_max_cosine,
    "uniformity": objectives.uniformity,
    "hpn": objectives.hpn,
    "ebv": objectives.ebv,
}


@dataclass(frozen=True)
class Prototypes:
    """C unit vectors in R^d and what they are worth.

    Attributes:
        points: float32 tensor [C, d] with unit rows, on the CPU.
        certificate: measured on these points.
    """

    points: Tensor
    certificate: Certificate


def build_prototypes(
    num_classes: int,
    dim: int,
    construction: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Prototypes:
    """Place C prototypes on the unit sphere of R^d.

    Args:
        num_classes: C ≥ 2.
        dim: d ≥ 1; with d = 1 no more than 2 classes fit.
        construction: one of ``CONSTRUCTIONS``. ``auto`` takes the optimal closed form where there is one (d
            ≥ C−1, C ≤ 2d, d = 2) and elsewhere the best of ``known``, ``max_cosine`` and ``max_cosine`` started
            from ``known``; the certificate names what was taken.
        seed: of ``auto``, ``max_cosine``, ``uniformity``, ``hpn``, ``ebv`` and ``etf``; the same seed gives the
            same points on the same machine and thread count (up to C = 512 on any count). ``known`` draws
            only subsets of very large codes. The others have nothing random.
        progress: called as ``progress(done, total)`` by the constructions that iterate.

    Raises:
        UserError: C or d is out of range, or the construction is unknown or undefined for this C and d.
    """
    check_shape(num_classes, dim)
    if construction not in CONSTRUCTIONS:
        remedy = f"Choose one of {', '.join(CONSTRUCTIONS)} (default auto)"
        raise UserError("method.prototypes", construction, "no such construction", remedy)
    _check_defined(construction, num_classes, dim)
    started = time.perf_counter()
    if construction in ("auto", "known"):
        points, made = _best(construction, num_classes, dim, seed, progress)
    else:
        points, made = _construct(construction, num_classes, dim, seed, progress), construction
    return Prototypes(points, certify(points, made, time.perf_counter() - started))


def check_shape(num_classes: int, dim: int) -> None:
    """Raise a UserError unless C distinct unit vectors exist in R^d and C ≥ 2."""
    if num_classes < 2:
        raise UserError("num_classes", num_classes, "a classifier needs at least 2 classes", "Give 2 or more")
    if dim < 1:
        raise UserError("dim", dim, "the embedding dimension must be positive", "Give 1 or more")
    if dim == 1 and num_classes > 2:
        message = f"the sphere of R^1 has 2 points, too few for {num_classes} classes"
        raise UserError("dim", dim, message, "Choose dim >= 2")


def _optimal(num_classes: int, dim: int) -> Construction | None:
    """The closed form that is optimal for any C×d like this, if there is one."""
    if num_classes <= dim + 1:
        return "simplex"
    if num_classes <= 2 * dim:
        return "blocks"
    return "polygon" if dim == 2 else None


def _is_known(num_classes: int, dim: int) -> bool:
    """Whether ``known`` has C points in R^d."""
    return _optimal(num_classes, dim) is not None or best_combination(num_classes, dim) is not None


def _best(
    construction: str, num_classes: int, dim: int, seed: int, progress: Progress | None
) -> tuple[Tensor, str]:
    """Points by ``auto`` or ``known``, and what they are made of."""
    optimal = _optimal(num_classes, dim)
    if optimal is not None:
        return _construct(optimal, num_classes, dim, seed, progress), optimal
    if construction == "auto":
        with threads_for(num_classes):
            found = best_found(num_classes, dim, seed, progress)
    else:
        found = best_known(num_classes, dim, seed)
    assert found is not None, "checked before"
    return found.points, found.construction


def is_defined(construction: str, num_classes: int, dim: int) -> bool:
    """Whether ``construction`` exists for C×d."""
    return _condition(construction, num_classes, dim)[0]


def _condition(construction: str, num_classes: int, dim: int) -> tuple[bool, str]:
    """Whether the condition for ``construction`` holds, and its words."""
    conditions = {
        "simplex": (dim >= num_classes - 1, "dim >= num_classes - 1"),
        "blocks": (dim < num_classes <= 2 * dim, "dim < num_classes <= 2 * dim"),
        "polygon": (dim == 2, "dim = 2"),
        "kasarla": (dim >= num_classes - 1, "dim >= num_classes - 1"),
        "etf": (dim >= num_classes, "dim >= num_classes"),
    }
    conditions["auto"] = (True, "")
    if construction == "known":
        conditions["known"] = (_is_known(num_classes, dim), "known codes with room for that many")
    return conditions.get(construction, (dim >= 2, "dim >= 2"))


def _check_defined(construction: str, num_classes: int, dim: int) -> None:
    """Raise a UserError where ``construction`` does not exist for C×d."""
    defined, condition = _condition(construction, num_classes, dim)
    if not defined:
        message = f"this construction needs {condition}; got num_classes = {num_classes}, dim = {dim}"
        remedy = (
            f"Choose auto (here {_optimal(num_classes, dim) or 'max_cosine or known'}), or a dim that fits"
        )
        raise UserError("method.prototypes", construction, message, remedy)


def _construct(construction: str, num_classes: int, dim: int, seed: int, progress: Progress | None) -> Tensor:
    if construction in _OPTIMIZERS:
        with threads_for(num_classes):
            return _OPTIMIZERS[construction](num_classes, dim, seed, progress)
    if construction == "etf":
        return simplex.etf(num_classes, dim, seed)
    if construction == "kasarla":
        return simplex.kasarla(num_classes, dim)
    if construction == "polygon":
        return simplex.polygon(num_classes)
    return simplex.blocks(num_classes, dim) if construction == "blocks" else simplex.simplex(num_classes, dim)
