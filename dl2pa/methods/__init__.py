"""Classification methods on embeddings, one module per method, with a common interface."""

from dl2pa.methods.base import Method
from dl2pa.methods.options import MethodOptions
from dl2pa.methods.prototypical import PrototypeMethod, assignment_from_vectors
from dl2pa.methods.registry import METHODS, LearnedEntry, PrototypeEntry
from dl2pa.methods.targets import Targets

__all__ = [
    "METHODS",
    "LearnedEntry",
    "Method",
    "MethodOptions",
    "PrototypeEntry",
    "PrototypeMethod",
    "Targets",
    "assignment_from_vectors",
]
