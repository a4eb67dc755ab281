"""Load a trained model from its safetensors file and predict, without its run directory or data set.

A model logged to MLflow contains this module: serving must install every package that it imports.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dl2pa.backbones import Embedder, build_embedder
from dl2pa.errors import UserError
from dl2pa.model.head import ClassifierHead, Norm
from dl2pa.rundir import find_model_file
from dl2pa.specs import backbone_spec
from pipelines.longtail import Group

_MAX_IMAGE_SIZE = 4096
_DAMAGE_ERRORS = (
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    MemoryError,
    AssertionError,
)
"""Errors that reading a damaged file can raise; RecursionError is a RuntimeError."""


class Prediction(NamedTuple):
    """One predicted class with its probability."""

    name: str
    label: int
    probability: float


@dataclass(frozen=True)
class Classifier:
    """Embedder, classifier head and description.

    Attributes:
        description: class names, preprocessing, backbone and method.
    """

    embedder: Embedder
    head: ClassifierHead
    description: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        return self.description["classes"]

    @property
    def groups(self) -> list[Group] | None:
        """Head, medium or tail per class; None if the training data was not long-tailed."""
        return self.description.get("groups")

    def to(self, device: torch.device) -> Classifier:
        """Return the classifier on a device; moves the embedder in place."""
        tensors = {name: value.to(device) for name, value in tensors_of(self.head).items()}
        head = _head_of(tensors, self.description)
        return Classifier(self.embedder.to(device), head, self.description)

    @torch.inference_mode()
    def score(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalized images [B, 3, H, W]."""
        return self.head.logits(self.embedder(images))

    def top(self, images: Tensor, count: int) -> list[list[Prediction]]:
        """The `count` most probable classes of each normalized image [B, 3, H, W], most probable first."""
        probabilities = self.score(images).softmax(dim=1)
        best = torch.topk(probabilities, min(count, probabilities.shape[1]))
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [
            [Prediction(self.classes[i], i, p) for i, p in zip(indices, values, strict=True)]
            for indices, values in rows
        ]


def load_classifier(path: Path) -> Classifier:
    """Load a model from a run directory, an export or the model file itself.

    Raises:
        UserError: the model is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    file = find_model_file(path)
    try:
        with safe_open(file, framework="pt") as stored:
            description = _check_description(json.loads(stored.metadata()["dl2pa"]))
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        prefix = "embedder."
        weights = {
            k.removeprefix(prefix): v.float() if v.is_floating_point() else v
            for k, v in tensors.items()
            if k.startswith(prefix)
        }
        embedder = _load_embedder(description, weights)
        head = _head_of(tensors, description)
        vectors_per_class = description.get("vectors_per_class", 1)
        if len(tensors["class_vectors"]) != len(description["classes"]) * vectors_per_class:
            raise ValueError("its number of class names differs from its class vectors")
    except (SafetensorError, OSError, UserError, *_DAMAGE_ERRORS) as error:
        reason = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(
            "model", str(file), f"is damaged or not a dl2pa model ({reason})", "Export it again."
        ) from None
    _freeze(embedder)
    return Classifier(embedder, head, description)


def _load_embedder(description: dict[str, Any], weights: dict[str, Tensor]) -> Embedder:
    """Build the embedder with the weights of a file.

    Sizes from an untrusted file must not allocate memory, so it is first built without weights. Some networks of the
    libraries cannot be, or compute tensors that are not part of their state; they are then built with weights.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                embedder = _build_described(description)
        except UserError:
            embedder = None
        if embedder is not None:
            embedder.load_state_dict(weights, assign=True)
        if embedder is None or backbone_spec(description["model"]["backbone"]).family == "timm":
            if len(weights.get("head.weight", ())) != description["model"]["embedding_dim"]:
                raise ValueError("the size of its head differs from its description")
            embedder = _build_described(description)
            embedder.load_state_dict(weights)
    return embedder


def _build_described(description: dict[str, Any]) -> Embedder:
    model = description["model"]
    return build_embedder(
        model["backbone"],
        model["embedding_dim"],
        head=model["head"],
        shortcut=model["shortcut"],
        widths=tuple(model["widths"]),
        image_size=description["preprocessing"]["image_size"],
    )


def _check_description(description: dict[str, Any]) -> dict[str, Any]:
    """Return a valid description; raise one of ``_DAMAGE_ERRORS`` otherwise."""
    classes, scale, prepared = description["classes"], description["scale"], description["preprocessing"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are not a list of names")
    if scale is not None and not (_is_number(scale) and 0 < scale < 1e9):
        raise ValueError(f"its scale is {scale!r}")
    sides = [prepared[key] for key in ("resize_shorter_side", "image_size")]
    if not all(type(side) is int and 0 < side <= _MAX_IMAGE_SIZE for side in sides):
        raise ValueError(f"its image sizes are {sides!r}")
    if prepared.get("interpolation", "bilinear") not in ("bilinear", "bicubic"):
        raise ValueError(f"its interpolation is {prepared['interpolation']!r}")
    for key in ("mean", "std"):
        if len(prepared[key]) != 3 or not all(map(_is_number, prepared[key])):
            raise ValueError(f"its {key} is {prepared[key]!r}")
    return description


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def tensors_of(head: ClassifierHead) -> dict[str, Tensor]:
    """Tensors of a classifier head, by their names in a model file."""
    tensors = {"class_vectors": head.vectors}
    if head.bias is not None:
        tensors["bias"] = head.bias
    for name, norm in (("feature_norm", head.feature_norm), ("class_norm", head.class_norm)):
        if norm is not None:
            tensors |= {f"{name}.gain": norm.gain, f"{name}.bias": norm.bias}
    return tensors


def _head_of(tensors: dict[str, Tensor], description: dict[str, Any]) -> ClassifierHead:
    """Classifier head of a model file. Early files lack `normalize`: they normalize if they have a scale."""
    norms = {
        name: Norm(tensors[f"{name}.gain"], tensors[f"{name}.bias"])
        for name in ("feature_norm", "class_norm")
        if f"{name}.gain" in tensors
    }
    scale = description["scale"]
    return ClassifierHead(
        tensors["class_vectors"],
        1.0 if scale is None else scale,
        normalize=description.get("normalize", scale is not None),
        per_class=description.get("vectors_per_class", 1),
        bias=tensors.get("bias"),
        **norms,
    )


def _freeze(module: nn.Module) -> None:
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
