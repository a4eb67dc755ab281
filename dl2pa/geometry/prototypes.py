"""Build prototypes by a named construction and certify them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dl2pa.constructions import (
    CONSTRUCTIONS,
    check_defined,
    closed_form,
    undefined,
)
from dl2pa.errors import UserError
from dl2pa.geometry import objectives, simplex
from dl2pa.geometry.certificate import Certificate, certify
from dl2pa.geometry.known import best_combination
from dl2pa.geometry.optimize import Progress, minimize_max_cosine, threads_for
from dl2pa.geometry.search import best_known, search_prototypes

_Optimizer = Callable[[int, int, int, Progress | None], Tensor]
_OPTIMIZERS: dict[str, _Optimizer] = {
    "max_cosine": minimize_max_cosine,
    "uniformity": objectives.uniformity,
    "hpn": objectives.hpn,
    "ebv": objectives.ebv,
}


@dataclass(frozen=True)
class Prototypes:
    """C unit vectors in R^d with their certificate.

    Attributes:
        points: float32 unit rows [C, d] on the CPU.
        certificate: measured quality of the points.
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
    """Construct C prototypes on the unit sphere of R^d.

    Args:
        num_classes: C ≥ 2.
        dim: d ≥ 1; d = 1 permits at most 2 classes.
        construction: one of `CONSTRUCTIONS`. `auto` selects the closed form that is optimal, if there is one (d ≥ C−1,
            C ≤ 2d or d = 2), else the best of `known`, `max_cosine` and `max_cosine` started from `known`; the
            certificate names the selection.
        seed: used by `auto`, `max_cosine`, `uniformity`, `hpn`, `ebv` and `etf`, and by `known` for subsets of very
            large codes; the other constructions are not random. The same seed gives identical points on the same
            machine with the same number of threads (up to C = 512 with any number of threads).
        progress: called as `progress(done, total)` by iterative constructions.

    Raises:
        UserError: C or d is out of range, or the construction is unknown or undefined for this C and d.
    """
    if construction not in CONSTRUCTIONS:
        remedy = f"Choose one of {', '.join(CONSTRUCTIONS)} (default: auto)."
        raise UserError("method.prototypes", construction, "unknown construction", remedy)
    check_construction(construction, num_classes, dim)
    started = time.perf_counter()
    if construction in ("auto", "known"):
        points, name = _best(construction, num_classes, dim, seed, progress)
    else:
        points, name = _construct(construction, num_classes, dim, seed, progress), construction
    return Prototypes(points, certify(points, name, time.perf_counter() - started))


def _best(
    construction: str, num_classes: int, dim: int, seed: int, progress: Progress | None
) -> tuple[Tensor, str]:
    """Construct the points by `auto` or `known`; also return the name of the selected construction."""
    optimal = closed_form(num_classes, dim)
    if optimal is not None:
        return _construct(optimal, num_classes, dim, seed, progress), optimal
    if construction == "auto":
        with threads_for(num_classes):
            best = search_prototypes(num_classes, dim, seed, progress)
    else:
        best = best_known(num_classes, dim, seed)
    assert best is not None, "checked before"
    return best.points, best.construction


def check_construction(construction: str, num_classes: int, dim: int) -> None:
    """Raise a UserError unless C and d are valid and `construction` is defined for C×d."""
    check_defined(construction, num_classes, dim)
    if construction != "known" or closed_form(num_classes, dim) is not None:
        return
    if best_combination(num_classes, dim) is None:
        raise undefined(construction, "known codes with enough points", num_classes, dim)


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
