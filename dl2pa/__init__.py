"""Hyperspherical classifiers with dynamic label-to-prototype assignment: the method and its training service.

The names of ``__all__`` are the Python API. They are imported at first use, so that importing the package imports
neither torch nor any other library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dl2pa.api import RunResult, load, train
    from dl2pa.errors import TrainingFailure, UserError
    from dl2pa.model.inference import Classifier, Prediction, Predictions

__version__ = "0.1.0"
__all__ = [
    "Classifier",
    "Prediction",
    "Predictions",
    "RunResult",
    "TrainingFailure",
    "UserError",
    "load",
    "train",
]

_MODULES = {
    **dict.fromkeys(("RunResult", "load", "train"), "dl2pa.api"),
    **dict.fromkeys(("TrainingFailure", "UserError"), "dl2pa.errors"),
    **dict.fromkeys(("Classifier", "Prediction", "Predictions"), "dl2pa.model.inference"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
