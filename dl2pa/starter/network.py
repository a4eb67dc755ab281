"""Choice of backbone and initial weights for a first configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dl2pa import zoo
from dl2pa.errors import UserError
from dl2pa.model.weight_sources import (
    LibraryWeights,
    find_weights,
    is_library_name,
    named_weights,
    preprocessing_of,
    recorded_model,
)
from dl2pa.specs import backbone_spec

NONE = "none"
"""Value of `--init` that starts from random weights."""
PREFERRED = {
    True: (
        "torchvision:resnet50.IMAGENET1K_V2",
        "torchvision:convnext_tiny.IMAGENET1K_V1",
        "torchvision:resnet18.IMAGENET1K_V1",
    ),
    False: (
        "torchvision:mobilenet_v3_large.IMAGENET1K_V2",
        "torchvision:efficientnet_b0.IMAGENET1K_V1",
        "torchvision:resnet18.IMAGENET1K_V1",
    ),
}
"""Pretrained weights by whether there is a GPU. The first that are on this machine are used, else the first."""
_RECORDED_KEYS = ("backbone", "widths", "shortcut")


@dataclass(frozen=True)
class Network:
    """Backbone and initial weights.

    Attributes:
        model: keys of section `model` that describe the network.
        init: `model.init`; None starts from random weights.
        chosen: whether the program chose the backbone.
        fetch: name for `dl2pa weights fetch`, if the weights are not on this machine.
        image_size: side of the images that the weights were evaluated with, in pixels; None if they do not record it.
        file: the file or run of the weights, if they are not those of a library.
    """

    model: dict[str, Any]
    init: str | None = None
    chosen: bool = False
    fetch: str | None = None
    image_size: int | None = None
    file: Path | None = None

    @property
    def backbone(self) -> str:
        """`model.backbone`."""
        return str(self.model["backbone"])


def choose_network(init: str | None, backbone: str | None, on_gpu: bool) -> Network | None:
    """Choose the network; None if a small one is to be trained from random weights.

    Imports torch only to look for the pretrained weights of a library.

    Args:
        init: `none`, a file or run, pretrained weights of a library, or None for a default.
        backbone: `model.backbone`, if the user has chosen it.

    Raises:
        UserError: unknown weights or backbone, or the backbone of a file is not known.
    """
    spec = None if backbone is None else backbone_spec(backbone)
    if spec is not None and spec.takes_features:
        remedy = "Choose a network for images, for example resnet50."
        raise UserError("model.backbone", backbone, "takes features, not images", remedy)
    if init == NONE or (init is None and spec is not None and spec.small):
        return None if backbone is None else Network({"backbone": backbone})
    if init is None and backbone is None:
        choices = [named_weights(name) for name in PREFERRED[on_gpu]]
        weights = next((one for one in choices if one.locate() is not None), choices[0])
        return _of_library(weights, chosen=True)
    if init is None:
        assert backbone is not None
        assert spec is not None
        return _of_library(named_weights(f"{spec.family}:{backbone.removeprefix(zoo.TIMM)}"))
    if is_library_name(init):
        weights = named_weights(init) if backbone is None else find_weights(init, backbone)
        assert isinstance(weights, LibraryWeights)
        return _of_library(weights)
    return _of_file(Path(init), backbone)


def _of_library(weights: LibraryWeights, chosen: bool = False) -> Network:
    library = weights.name.partition(":")[0]
    backbone = f"{zoo.TIMM}{weights.model}" if library == "timm" else weights.model
    missing = weights.locate() is None
    return Network(
        {"backbone": backbone},
        f"{library}:{weights.tag}",
        chosen,
        weights.name if missing else None,
        int(weights.preprocessing["image_size"]),
    )


def _of_file(path: Path, backbone: str | None) -> Network:
    name = str(path)
    if not path.exists() and (
        name in zoo.torchvision_models() or name.removeprefix(zoo.TIMM) in zoo.timm_models()
    ):
        remedy = f"Give --backbone {name} for its default weights."
        raise UserError("--init", name, "is the name of a network, not of weights", remedy)
    recorded = {key: value for key, value in recorded_model(path).items() if key in _RECORDED_KEYS}
    if backbone is not None:
        model = {**recorded, "backbone": backbone} if recorded.get("backbone") == backbone else {}
        model = model or {"backbone": backbone}
    elif "backbone" in recorded:
        model = recorded
    else:
        remedy = "Give --backbone NAME: the network that the file has the weights of."
        raise UserError("--init", str(path), "does not record its backbone", remedy)
    if not backbone_spec(model["backbone"]).small:
        model = {"backbone": model["backbone"]}
    size = preprocessing_of(str(path), model["backbone"]).get("image_size")
    return Network(model, os.path.normpath(path.absolute()), image_size=size, file=path)
