"""Write a trained model as one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dl2pa.config import Config
from dl2pa.methods import PrototypeMethod
from dl2pa.model.frozen import model_description
from dl2pa.model.inference import Classifier, tensors_of
from dl2pa.model.model import Model
from dl2pa.osutil import replacing
from dl2pa.specs import FEATURES
from pipelines.datasets.features import FeatureFolder
from pipelines.longtail import Group

_FORMAT = "dl2pa-model-1"


@torch.no_grad()
def save_classifier(
    path: Path,
    model: Model,
    config: Config,
    classes: tuple[str, ...],
    groups: tuple[Group, ...] | None = None,
    temperature: float | None = None,
) -> None:
    """Write weights, class vectors, P, σ, class names and preprocessing to one safetensors file, atomically.

    The file contains no time and no path: equal models give equal bytes.

    Args:
        temperature: divides the logits to give calibrated probabilities; None if it was not fitted.
    """
    method = model.method
    tensors = {f"embedder.{k}": v for k, v in model.embedder.state_dict().items()}
    head = method.head()
    tensors |= tensors_of(head)
    if isinstance(method, PrototypeMethod):
        tensors |= {"prototypes": method.prototypes, "assignment": method.assignment}
    description = {
        "format": _FORMAT,
        "classes": list(classes),
        "scale": float(head.scale),
        "normalize": head.normalize,
        "vectors_per_class": head.per_class,
        "method": config.method.name,
        "model": model_description(config.model),
        "preprocessing": preprocessing_of(config),
        "groups": None if groups is None else list(groups),
    }
    if temperature is not None:
        description["temperature"] = temperature
    if config.data.dataset == FEATURES:
        network = _network_of(config)
        description |= {
            "preprocessing": network["preprocessing"],
            "features": {k: network[k] for k in ("dim", "digest")},
        }
    _write(path, tensors, description)


def write_classifier(path: Path, classifier: Classifier) -> None:
    """Write a loaded classifier to one safetensors file, atomically; without the prototypes and their assignment."""
    tensors = {f"embedder.{k}": v for k, v in classifier.embedder.state_dict().items()}
    _write(path, tensors | tensors_of(classifier.head), classifier.description)


def _network_of(config: Config) -> dict[str, Any]:
    """Record of the frozen network whose features `data.dataset=features` contains."""
    return FeatureFolder(Path(config.data.root or "")).read_complete()["network"]


def _write(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with replacing(path, sum(t.nbytes for t in contiguous.values())) as temporary:
        save_file(contiguous, temporary, metadata={"dl2pa": json.dumps(description, sort_keys=True)})


def preprocessing_of(config: Config) -> dict[str, Any]:
    """Resize, crop and normalization that validation applies."""
    in_memory = config.loader in ("resident", "synthetic")
    prepared: dict[str, Any] = {
        "resize_shorter_side": config.data.image_size if in_memory else config.data.eval_resize,
        "image_size": config.data.image_size,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
    }
    if config.data.interpolation != "bilinear":  # early files have no such entry
        prepared["interpolation"] = config.data.interpolation
    return prepared
