"""The trained model on its own: one safetensors file that needs neither its run nor its data to predict."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dl2pa.backbones import Embedder, build_embedder
from dl2pa.config import Config
from dl2pa.errors import UserError
from dl2pa.methods import Norm, PrototypeMethod, Readout
from dl2pa.training.model import Trainee
from pipelines.longtail import Group

_FORMAT = "dl2pa-model-1"


@dataclass(frozen=True)
class Classifier:
    """Embedder, readout and what to know about them.

    Attributes:
        description: class names, preprocessing, backbone and method.
    """

    embedder: Embedder
    readout: Readout
    description: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        return self.description["classes"]

    @property
    def groups(self) -> list[Group] | None:
        """Head, medium or tail for each class, by the training data; None where that had no long tail."""
        return self.description.get("groups")

    def to(self, device: torch.device) -> Classifier:
        tensors = {name: value.to(device) for name, value in _tensors_of(self.readout).items()}
        readout = _readout_of(tensors, self.description)
        return Classifier(self.embedder.to(device), readout, self.description)

    @torch.inference_mode()
    def score(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalised images [B, 3, H, W]."""
        return self.readout.logits(self.embedder(images))


@torch.no_grad()
def save_classifier(
    path: Path,
    trainee: Trainee,
    config: Config,
    classes: tuple[str, ...],
    groups: tuple[Group, ...] | None = None,
) -> None:
    """Write weights, class vectors, P, σ, class names and preprocessing to one safetensors file, atomically.

    The bytes depend on nothing but those: no time, no path.
    """
    from safetensors.torch import save_file

    method = trainee.method
    tensors = {f"embedder.{k}": v for k, v in trainee.embedder.state_dict().items()}
    readout = method.readout()
    tensors |= _tensors_of(readout)
    if isinstance(method, PrototypeMethod):
        tensors |= {"prototypes": method.prototypes, "assignment": method.assignment}
    description = {
        "format": _FORMAT,
        "classes": list(classes),
        "scale": float(readout.scale),
        "normalize": readout.normalize,
        "vectors_per_class": readout.per_class,
        "method": config.method.name,
        "model": config.model.model_dump(mode="json"),
        "preprocessing": _preprocessing(config),
        "groups": None if groups is None else list(groups),
    }
    aside = path.with_name(f".{path.name}.aside")
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(contiguous, aside, metadata={"dl2pa": json.dumps(description, sort_keys=True)})
    aside.replace(path)


def load_classifier(path: Path) -> Classifier:
    """Read a run directory, an export or the file itself.

    Raises:
        UserError: no model there, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            "model",
            str(path),
            "holds no model.safetensors",
            "Give a finished run, an export, or the file itself.",
        )
    try:
        with safe_open(file, framework="pt") as stored:
            description = json.loads(stored.metadata()["dl2pa"])
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        model = description["model"]
        embedder = build_embedder(
            model["backbone"],
            model["embedding_dim"],
            head=model["head"],
            shortcut=model["shortcut"],
            widths=tuple(model["widths"]),
        )
        prefix = "embedder."
        weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        embedder.load_state_dict(weights)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError("model", str(file), f"is damaged or not ours ({error})", "Export it again.") from None
    if len(tensors["class_vectors"]) != len(description["classes"]) * description.get("vectors_per_class", 1):
        raise UserError("model", str(file), "names more or fewer classes than it has", "Export it again.")
    _frozen(embedder)
    return Classifier(embedder, _readout_of(tensors, description), description)


def _tensors_of(readout: Readout) -> dict[str, Tensor]:
    """A readout's tensors by the names they have in a model file."""
    tensors = {"class_vectors": readout.vectors}
    if readout.bias is not None:
        tensors["bias"] = readout.bias
    for name, norm in (("feature_norm", readout.feature_norm), ("class_norm", readout.class_norm)):
        if norm is not None:
            tensors |= {f"{name}.gain": norm.gain, f"{name}.bias": norm.bias}
    return tensors


def _readout_of(tensors: dict[str, Tensor], description: dict[str, Any]) -> Readout:
    """The readout a model file describes. The first files say no `normalize`: theirs is that a scale is named."""
    norms = {
        name: Norm(tensors[f"{name}.gain"], tensors[f"{name}.bias"])
        for name in ("feature_norm", "class_norm")
        if f"{name}.gain" in tensors
    }
    scale = description["scale"]
    return Readout(
        tensors["class_vectors"],
        1.0 if scale is None else scale,
        normalize=description.get("normalize", scale is not None),
        per_class=description.get("vectors_per_class", 1),
        bias=tensors.get("bias"),
        **norms,
    )


def _preprocessing(config: Config) -> dict[str, Any]:
    resident = config.loader in ("resident", "synthetic")
    return {
        "resize_shorter_side": config.data.image_size if resident else config.data.eval_resize,
        "image_size": config.data.image_size,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
    }


def _frozen(module: nn.Module) -> None:
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
