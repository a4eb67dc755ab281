"""Load a trained model from its safetensors file, predict and embed, without its run directory or data set.

A model logged to MLflow contains this module: serving must install every package that it imports.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dl2pa.backbones import Embedder
from dl2pa.errors import UserError
from dl2pa.model.frozen import MAX_DIM, build_described, build_frozen, put_before
from dl2pa.model.head import ClassifierHead, Norm
from dl2pa.rundir import find_model_file
from dl2pa.specs import backbone_spec
from pipelines.longtail import Group
from pipelines.user_images import each_image, prepare

if TYPE_CHECKING:
    from pipelines.user_images import Images

BATCH = 64
"""Images per batch of `predict` and `embed`."""
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


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions for N images, in the order of the images.

    Attributes:
        classes: names of the C classes.
        scores: logits, float32 [N, C].
        probabilities: softmax of the scores divided by the temperature of the model, float32 [N, C].
    """

    classes: list[str]
    scores: NDArray[np.float32]
    probabilities: NDArray[np.float32]

    @property
    def labels(self) -> NDArray[np.int64]:
        """Index of the class with the highest score, int64 [N]."""
        return self.scores.argmax(axis=1)

    @property
    def names(self) -> list[str]:
        """Name of the class with the highest score, per image."""
        return [self.classes[label] for label in self.labels]

    def top(self, count: int) -> list[list[Prediction]]:
        """The `count` most probable classes of each image, most probable first."""
        order = np.argsort(-self.scores, axis=1, kind="stable")[:, :count]
        chosen = np.take_along_axis(self.probabilities, order, axis=1)
        return [
            [Prediction(self.classes[i], i, p) for i, p in zip(labels, values, strict=True)]
            for labels, values in zip(order.tolist(), chosen.tolist(), strict=True)
        ]


@dataclass(frozen=True, repr=False)
class Classifier:
    """Trained model: embedder, classifier head and description.

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
    def takes_features(self) -> bool:
        """Whether the input is a feature vector of a frozen network, instead of an image."""
        return "features" in self.description

    @property
    def temperature(self) -> float:
        """Divides the logits to give calibrated probabilities; 1 if none was fitted, as for a checkpoint."""
        fitted = self.fitted_temperature
        return 1.0 if fitted is None else fitted

    @property
    def fitted_temperature(self) -> float | None:
        """Temperature that was fitted at the end of the run; None without one."""
        return float(self.description["temperature"]) if "temperature" in self.description else None

    @property
    def groups(self) -> list[Group] | None:
        """Head, medium or tail per class; None if the training data was not long-tailed."""
        return self.description.get("groups")

    def to(self, device: torch.device) -> Classifier:
        """Return the classifier on a device; moves the embedder in place."""
        tensors = {name: value.to(device) for name, value in tensors_of(self.head).items()}
        head = _head_of(tensors, self.description)
        return Classifier(self.embedder.to(device), head, self.description)

    @property
    def device(self) -> torch.device:
        return self.head.vectors.device

    @property
    def class_vectors(self) -> NDArray[np.float32]:
        """Unit class vectors, float32 [C, d]; [C·K, d] with K consecutive vectors per class.

        For methods with prototypes, row c is the prototype that is assigned to class c.
        """
        return F.normalize(self.head.vectors.float(), dim=1).cpu().numpy()

    def predict(self, images: Images) -> Predictions:
        """Classify images, prepared as in the run's evaluation.

        Args:
            images: files, Pillow images, and uint8 arrays or tensors [H, W, 3] or [N, H, W, 3] in RGB order; one of
                them or an iterable. One image is a batch of one.

        Raises:
            UserError: something that is not an image, or a file that cannot be read.
        """
        return self.predict_prepared(self._prepare(images))

    @torch.inference_mode()
    def predict_prepared(self, batches: Iterable[Tensor]) -> Predictions:
        """Classify batches of normalized images [B, 3, H, W] on the device of the classifier."""
        scores = [torch.empty(0, self.head.num_classes)]
        probabilities = scores.copy()
        for images in batches:
            logits = self.score(images)
            scores.append(logits.cpu())
            probabilities.append(self.probabilities(logits).cpu())
        return Predictions(self.classes, torch.cat(scores).numpy(), torch.cat(probabilities).numpy())

    @torch.inference_mode()
    def embed(self, images: Images) -> NDArray[np.float32]:
        """Embed images: unit vectors, float32 [N, d]; their products with `class_vectors` are cosines.

        Args:
            images: see ``predict``.

        Raises:
            UserError: something that is not an image, or a file that cannot be read.
        """
        parts = [torch.empty(0, self.head.vectors.shape[1])]
        for batch in self._prepare(images):
            parts.append(self.unit_vectors(batch).cpu())
        return torch.cat(parts).numpy()

    @torch.inference_mode()
    def unit_vectors(self, images: Tensor) -> Tensor:
        """Unit embeddings [B, d] of normalized images [B, 3, H, W]."""
        return F.normalize(self.head.embed(self.embedder(images)), dim=1)

    def _prepare(self, images: Images) -> Iterator[Tensor]:
        """Batches of normalized images [B, 3, S, S] on the device of the classifier."""
        prepared = (prepare(image, **self.description["preprocessing"]) for image in each_image(images))
        while batch := list(itertools.islice(prepared, BATCH)):
            stacked = torch.stack(batch).to(self.device)
            yield stacked.contiguous(memory_format=torch.channels_last)  # as the batches of an evaluation

    def __repr__(self) -> str:
        classes, dim, backbone = (
            len(self.classes),
            self.head.vectors.shape[1],
            self.description["model"]["backbone"],
        )
        return f"Classifier({backbone}, {dim} dimensions, {classes} classes, {self.device})"

    @torch.inference_mode()
    def score(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalized images [B, 3, H, W]."""
        return self.head.logits(self.embedder(images))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Calibrated probabilities [B, C] of logits [B, C]."""
        return (logits / self.temperature).softmax(dim=1)


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
        networks = [
            description["model"],
            *([description["frozen"]["model"]] if "frozen" in description else []),
        ]
        if embedder is None or any(backbone_spec(n["backbone"]).family == "timm" for n in networks):
            if len(weights.get("head.weight", ())) != description["model"]["embedding_dim"]:
                raise ValueError("the size of its head differs from its description")
            embedder = _build_described(description)
            embedder.load_state_dict(weights)
    return embedder


def _build_described(description: dict[str, Any]) -> Embedder:
    side, frozen = description["preprocessing"]["image_size"], description.get("frozen")
    dim = (frozen or description.get("features", {})).get("dim", 0)
    embedder = build_described(description["model"], side, dim)
    return embedder if frozen is None else put_before(build_frozen(frozen, side), embedder, side)


def _check_description(description: dict[str, Any]) -> dict[str, Any]:
    """Return a valid description; raise one of ``_DAMAGE_ERRORS`` otherwise."""
    classes, scale, prepared = description["classes"], description["scale"], description["preprocessing"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are not a list of names")
    if scale is not None and not (_is_number(scale) and 0 < scale < 1e9):
        raise ValueError(f"its scale is {scale!r}")
    temperature = description.get("temperature", 1.0)
    if not (_is_number(temperature) and 1e-9 < temperature < 1e9):
        raise ValueError(f"its temperature is {temperature!r}")
    sides = [prepared[key] for key in ("resize_shorter_side", "image_size")]
    if not all(type(side) is int and 0 < side <= _MAX_IMAGE_SIZE for side in sides):
        raise ValueError(f"its image sizes are {sides!r}")
    if prepared.get("interpolation", "bilinear") not in ("bilinear", "bicubic"):
        raise ValueError(f"its interpolation is {prepared['interpolation']!r}")
    for key in ("mean", "std"):
        if len(prepared[key]) != 3 or not all(map(_is_number, prepared[key])):
            raise ValueError(f"its {key} is {prepared[key]!r}")
    for part in ("features", "frozen"):
        if part in description and not 0 < description[part]["dim"] <= MAX_DIM:
            raise ValueError(f"its features have {description[part]['dim']!r} dimensions")
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
