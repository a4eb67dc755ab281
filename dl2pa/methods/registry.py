"""Methods by name. A new one is a file with a class, a row here and its defaults in the catalog."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dl2pa.methods.base import Method
from dl2pa.methods.dl2pa import Dl2pa
from dl2pa.methods.dnc import Dnc
from dl2pa.methods.ebv import Ebv
from dl2pa.methods.etf import Etf
from dl2pa.methods.goto import Goto
from dl2pa.methods.hpn import Hpn
from dl2pa.methods.kasarla import Kasarla
from dl2pa.methods.options import MethodOptions
from dl2pa.methods.prototypical import PrototypeMethod
from dl2pa.methods.psc import Psc
from dl2pa.methods.word2vec import Word2Vec
from dl2pa.specs import METHODS as CATALOG
from dl2pa.specs import MethodDefaults


@dataclass(frozen=True)
class Entry:
    """A method's defaults."""

    defaults: MethodDefaults

    def options(self, **given: Any) -> MethodOptions:
        """The method's own choices but for those given; None counts as not given."""
        own = self.defaults
        choices: dict[str, Any] = {
            "loss": own.loss,
            "dynamic": own.assignment == "dynamic",
            "scale": own.scale,
            "label_smoothing": own.label_smoothing,
            "normalize": own.normalize,
            "sub_prototypes": own.sub_prototypes,
            "centroid_momentum": own.centroid_momentum,
        }
        return MethodOptions(**{**choices, **{k: v for k, v in given.items() if v is not None}})


@dataclass(frozen=True)
class PrototypeEntry(Entry):
    """A method over fixed prototypes: built from P [C, d], options and the first σ."""

    build: Callable[[Tensor, MethodOptions, Tensor | None], PrototypeMethod]


@dataclass(frozen=True)
class LearnedEntry(Entry):
    """A method that learns its class vectors: built from C, d and options."""

    build: Callable[[int, int, MethodOptions], Method]


METHODS: dict[str, PrototypeEntry | LearnedEntry] = {
    "dl2pa": PrototypeEntry(CATALOG["dl2pa"], Dl2pa),
    "psc": LearnedEntry(CATALOG["psc"], Psc),
    "word2vec": PrototypeEntry(CATALOG["word2vec"], Word2Vec),
    "hpn": PrototypeEntry(CATALOG["hpn"], Hpn),
    "ebv": PrototypeEntry(CATALOG["ebv"], Ebv),
    "etf": PrototypeEntry(CATALOG["etf"], Etf),
    "kasarla": PrototypeEntry(CATALOG["kasarla"], Kasarla),
    "dnc": LearnedEntry(CATALOG["dnc"], Dnc),
    "goto": LearnedEntry(CATALOG["goto"], Goto),
}
