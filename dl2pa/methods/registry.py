"""Methods by name. A new one is a file with a class, a row here and a name in the configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dl2pa.methods.base import Method
from dl2pa.methods.dl2pa import Dl2pa
from dl2pa.methods.hpn import Hpn
from dl2pa.methods.prototypical import PrototypeMethod, PrototypeOptions
from dl2pa.methods.psc import Psc

PrototypeClass = Callable[[Tensor, PrototypeOptions, Tensor | None], PrototypeMethod]


@dataclass(frozen=True)
class PrototypeEntry:
    """A method over fixed prototypes, and the construction it uses unless told otherwise."""

    build: PrototypeClass
    construction: str


PROTOTYPE_METHODS = {
    "dl2pa": PrototypeEntry(Dl2pa, "auto"),
    "hpn": PrototypeEntry(Hpn, "hpn"),
}


def build_learned(
    num_classes: int, dim: int, *, normalize: bool, scale: float, label_smoothing: float
) -> Method:
    """The learned classifier."""
    return Psc(num_classes, dim, normalize=normalize, scale=scale, label_smoothing=label_smoothing)
