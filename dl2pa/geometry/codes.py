"""Registry of known spherical codes: size, largest cosine and construction.

Each family is a code and its *derived* codes. A derived code consists of the points at the largest cosine c from
one point, projected onto the complement of that point: one dimension less, largest cosine (c − c²)/(1 − c²) =
c/(1 + c). Kerdock and Gold codes are shortened instead, which also removes dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from dl2pa.geometry import golay, quadrangles, sequences
from dl2pa.geometry.golay import Floats

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Code:
    """A spherical code of known size.

    Attributes:
        name: ASCII name for certificates.
        size: number of points.
        dim: dimension of the points.
        cosine: largest cosine between two points, in closed form; built points have it up to rounding.
        build: returns the points, float64 unit rows [size, dim].
    """

    name: str
    size: int
    dim: int
    cosine: float
    build: Callable[[], Floats]

    def __str__(self) -> str:
        return f"{self.name} ({self.size}x{self.dim})"


@cache
def known_codes() -> tuple[Code, ...]:
    """List all codes of this module without building them."""
    codes: list[Code] = []
    codes += _family("E8 roots", _e8, 8, 2, (240, 56, 27, 16, 10))
    codes += _family("Leech minimal vectors", _leech, 24, 2, (196_560, 4_600, 891, 336, 170, 100))
    codes += _family("276 equiangular lines", _lines, 23, 5, (552, 275, 162, 105, 72, 51))
    codes += _family("Higman-Sims", golay.higman_sims, 22, 11, (100, 77, 60, 47))
    for q, sizes in _QUADRANGLES.items():
        build = partial(quadrangles.quadrangle, q)
        codes += _family(f"quadrangle GQ({q},{q * q})", build, q * (q * q - q + 1), q * q, sizes)
    for degree in (3, 5, 7):
        codes += _kerdock_family(degree)
    for degree in (5, 7):
        codes += _gold_family(degree)
    return tuple(codes)


# Sizes of the quadrangle code over GF(q) and of its dense derived codes. They depend on the points chosen.
_QUADRANGLES = {
    3: (112, 81, 60, 45),
    4: (325, 256, 204, 164, 133, 111),
    5: (756, 625, 520, 435, 366, 313, 276, 255),
    7: (2752, 2401, 2100, 1841, 1618, 1431, 1280, 1165, 1086, 1043),
}


def derived(points: Floats, cosine: float) -> Floats:
    """Derive a code [m, d − 1] from unit rows [n, d]: the points at `cosine` < 1 from the first point, projected."""
    center = points[0]
    kept = points[np.abs(points @ center - cosine) < _TOLERANCE]
    return _unit(_in_complement(kept - cosine * center, center))


def _family(
    name: str, build: Callable[[], Floats], dim: int, inverse_cosine: int, sizes: tuple[int, ...]
) -> list[Code]:
    """A code with largest cosine 1/k and its derived codes with 1/(k+1), 1/(k+2), …"""
    codes = [Code(name, sizes[0], dim, 1.0 / inverse_cosine, build)]
    for times, size in enumerate(sizes[1:], start=1):
        build = partial(_derived_from, codes[-1])
        cosine = 1.0 / (inverse_cosine + times)
        codes.append(Code(f"{name} derived {times}x", size, dim - times, cosine, build))
    return codes


def _derived_from(code: Code) -> Floats:
    return derived(code.build(), code.cosine)


def _kerdock_family(degree: int) -> list[Code]:
    length = 2 << degree
    root = math.isqrt(length)
    name = "Nordstrom-Robinson" if degree == 3 else f"Kerdock {length}"
    with_axes = Code(
        f"{name} with axes", length * length + 2 * length, length, 1 / root, partial(_with_axes, degree)
    )
    codes = [with_axes]
    for times in range(1, 6):
        cosine = (root - times) / (length - times)
        size, dim = length * length >> times, length - times
        if size > 2 * dim:
            build = partial(_shortened, sequences.kerdock, degree, times)
            codes.append(Code(f"{name} shortened {times}x", size, dim, cosine, build))
    return codes


def _gold_family(degree: int) -> list[Code]:
    length = 1 << degree
    largest = math.isqrt(2 * length)
    codes: list[Code] = []
    for times in range(6):
        build = partial(_shortened, sequences.gold, degree, times)
        name = f"Gold {length} shortened {times}x" if times else f"Gold {length}"
        cosine = (largest - times) / (length - times)
        codes.append(Code(name, 2 * length * length >> times, length - times, cosine, build))
    return codes


def _e8() -> Floats:
    return _unit(golay.e8_roots())


def _leech() -> Floats:
    return _unit(golay.leech_minimal_vectors())


def _lines() -> Floats:
    vectors, normal = golay.equiangular_276()
    return _unit(_in_complement(vectors.astype(np.float64), normal.astype(np.float64)))


def _with_axes(degree: int) -> Floats:
    """A Kerdock code and the positive and negative axes, whose cosines to its words are ±1/√n."""
    words = sequences.kerdock(degree)
    axes = np.eye(words.shape[1])
    return np.concatenate([_unit(words), axes, -axes])


def _shortened(family: Callable[[int], sequences.Signs], degree: int, times: int) -> Floats:
    return _unit(sequences.shortened(family(degree), times))


def _unit(points: NDArray[np.generic]) -> Floats:
    rows = points.astype(np.float64)
    return rows / np.sqrt((rows * rows).sum(axis=1, keepdims=True))


def _in_complement(points: Floats, normal: Floats) -> Floats:
    """Coordinates [n, d − 1] of points orthogonal to `normal`, after a reflection of `normal` to the first axis."""
    mirror = normal / math.sqrt(float(normal @ normal))
    mirror[0] += math.copysign(1.0, mirror[0])
    mirror /= math.sqrt(float(mirror @ mirror))
    return (points - 2.0 * (points @ mirror)[:, None] * mirror)[:, 1:]
