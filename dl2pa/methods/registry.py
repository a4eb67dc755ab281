"""Methods by name. To add one, write a module with its class and add a row to `dl2pa.specs.METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from torch import Tensor

from dl2pa import specs
from dl2pa.methods.base import Method
from dl2pa.methods.options import MethodOptions
from dl2pa.methods.prototypical import PrototypeMethod


@dataclass(frozen=True)
class Entry:
    """A method with its defaults."""

    defaults: specs.MethodSpec

    def options(self, **overrides: Any) -> MethodOptions:
        """Return the method's defaults, replaced by the overrides that are not None."""
        defaults = self.defaults
        options: dict[str, Any] = {
            "loss": defaults.loss,
            "dynamic": defaults.assignment == "dynamic",
            "scale": defaults.scale,
            "label_smoothing": defaults.label_smoothing,
            "normalize": defaults.normalize,
            "sub_prototypes": defaults.sub_prototypes,
            "centroid_momentum": defaults.centroid_momentum,
        }
        return MethodOptions(**{**options, **{k: v for k, v in overrides.items() if v is not None}})


@dataclass(frozen=True)
class PrototypeEntry(Entry):
    """A method with fixed prototypes: built from P [C, d], options and the initial assignment."""

    build: Callable[[Tensor, MethodOptions, Tensor | None], PrototypeMethod]


@dataclass(frozen=True)
class LearnedEntry(Entry):
    """A method with learned class vectors: built from C, d and options."""

    build: Callable[[int, int, MethodOptions], Method]


METHODS: dict[str, PrototypeEntry | LearnedEntry] = {
    name: (LearnedEntry if spec.learned else PrototypeEntry)(spec, resolve_name(spec.builder))
    for name, spec in specs.METHODS.items()
}
