from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dl2pa.errors import UserError
from pipelines.batch import Pipeline
from pipelines.datasets.table import ImageTable
from pipelines.sampler import EvalSampler
from pipelines.single import load_image
from pipelines.transforms import Transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(path: Path, resize: int = 256, size: int = 224, **options: str) -> torch.Tensor:
    return load_image(path, resize_shorter_side=resize, image_size=size, mean=MEAN, std=STD, **options)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preparation_matches_torchvision(photographs: list[Path], interpolation: str) -> None:
    transform = v2.Compose(
        [
            v2.Resize(256, v2.InterpolationMode(interpolation)),
            v2.CenterCrop(224),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    for path in photographs[:4]:
        pixels = load(path, interpolation=interpolation)
        assert torch.allclose(pixels, transform(Image.open(path).convert("RGB")), atol=1e-5)


def test_prediction_and_validation_have_the_same_pixels(
    folder: Callable[..., ImageTable], pipeline_over: Callable[..., Pipeline]
) -> None:
    dataset = folder(3)
    transforms = Transforms(32, train=False, eval_resize=40, mean=MEAN, std=STD)
    (batch,) = pipeline_over(dataset, "torchvision", transforms, EvalSampler(3, 3))
    for i in range(3):
        assert torch.equal(load(dataset.path(i), 40, 32), batch.images[i])


@pytest.mark.parametrize("content", [None, b"", b"no image", "cut"])
def test_file_that_is_not_an_image_raises_an_error(
    tmp_path: Path, drawn: Any, content: bytes | str | None
) -> None:
    path = tmp_path / "image.jpeg"
    if content is not None:
        path.write_bytes(drawn.encoded(0)[:-200] if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        load(path)
    assert caught.value.field == "image"
    assert caught.value.value == str(path)
    assert " at 0x" not in str(caught.value)


def test_folder_raises_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        load(tmp_path)
