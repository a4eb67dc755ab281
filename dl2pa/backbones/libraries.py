"""Backbones of torchvision and timm, without their classifier and for a given image size."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn

from dl2pa.backbones.probe import probe_forward
from dl2pa.errors import UserError
from dl2pa.specs import BackboneSpec

_CLASSES = 1000
"""Classes of the classifier that torchvision builds."""
_SIZED = {"vit_": ("image_size", False), "maxvit_": ("input_size", True)}
"""Prefix of the torchvision models of a fixed image size: the argument, and whether it is a pair."""
_NO_AUXILIARY = ("googlenet", "inception_v3")
"""torchvision models with auxiliary classifiers, which training would return as further outputs."""
_SIZE_ERRORS = (AssertionError, ValueError, RuntimeError, TypeError, IndexError, ZeroDivisionError)


def build_library_backbone(name: str, spec: BackboneSpec, image_size: int) -> tuple[nn.Module, int]:
    """Build a network of torchvision or timm with random weights; returns it and its feature dimension.

    Raises:
        UserError: the network does not accept images of this size, or its output is not one vector per image.
    """
    try:
        is_timm = spec.family == "timm"
        body = _build_timm(spec.builder, image_size) if is_timm else _build_torchvision(spec, image_size)
        features = spec.features or _feature_dimension(name, body, image_size)
    except UserError:
        raise
    except _SIZE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        message = f"{name} does not accept images of {image_size} x {image_size} pixels ({reason})"
        remedy = "Choose the size that the network was made for, usually 224 or a multiple of 32."
        raise UserError("data.image_size", image_size, message, remedy) from None
    return body, features


def _feature_dimension(name: str, body: nn.Module, image_size: int) -> int:
    shape = probe_forward(body, image_size).shape
    if shape is None or len(shape) != 2:
        message = "does not compute one feature vector per image"
        raise UserError("model.backbone", name, message, "Choose an image classification network.")
    return shape[1]


def _build_torchvision(spec: BackboneSpec, image_size: int) -> nn.Module:
    name = spec.builder.partition(":")[2]
    arguments: dict[str, Any] = {}
    for prefix, (argument, pair) in _SIZED.items():
        if name.startswith(prefix):
            arguments[argument] = (image_size, image_size) if pair else image_size
    if name in _NO_AUXILIARY:
        arguments |= {"aux_logits": False, "init_weights": True}
    body: nn.Module = resolve_name(spec.builder)(weights=None, **arguments)
    body.set_submodule(spec.classifier or _classifier_of(body), nn.Identity())
    return body


def _classifier_of(body: nn.Module) -> str:
    """Name of the last layer that computes class scores."""
    names = [
        name
        for name, module in body.named_modules()
        if (isinstance(module, nn.Linear) and module.out_features == _CLASSES)
        or (isinstance(module, nn.Conv2d) and module.out_channels == _CLASSES)
    ]
    return names[-1]


def _build_timm(name: str, image_size: int) -> nn.Module:
    import timm

    state = torch.get_rng_state()
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, img_size=image_size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    torch.set_rng_state(state)  # the network accepts images of any size
    return timm.create_model(name, pretrained=False, num_classes=0)
