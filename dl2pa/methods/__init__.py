"""Classifiers over embeddings, one file a method, behind one contract."""

from dl2pa.methods.base import Method
from dl2pa.methods.prototypical import PrototypeMethod, PrototypeOptions, assignment_from_vectors
from dl2pa.methods.registry import PROTOTYPE_METHODS, build_learned
from dl2pa.methods.targets import Targets

__all__ = [
    "PROTOTYPE_METHODS",
    "Method",
    "PrototypeMethod",
    "PrototypeOptions",
    "Targets",
    "assignment_from_vectors",
    "build_learned",
]
