"""Files, Pillow images, arrays and tensors of the same pixels give the same prepared image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dl2pa.errors import UserError
from pipelines.user_images import each_image, prepare

PREPROCESSING: dict[str, Any] = {
    "resize_shorter_side": 20,
    "image_size": 16,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
}
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)


def images(*inputs: Any) -> torch.Tensor:
    return torch.stack([prepare(image, **PREPROCESSING) for part in inputs for image in each_image(part)])


def test_every_form_of_an_image_gives_the_same_pixels(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(file)
    tensor = torch.from_numpy(PIXELS)
    forms = [file, str(file), Image.open(file), PIXELS, tensor, PIXELS[::1], np.asfortranarray(PIXELS)]
    prepared = images(*forms)
    assert prepared.shape == (7, 3, 16, 16)
    assert prepared.dtype == torch.float32
    assert (prepared == prepared[0]).all()
    assert prepared.std() > 0.1


def test_gray_and_transparent_images_are_converted(tmp_path: Path) -> None:
    gray = Image.fromarray(PIXELS[..., 0])
    gray.save(tmp_path / "gray.png")
    from_file, from_memory, alpha = images(tmp_path / "gray.png", gray, gray.convert("LA"))
    assert torch.equal(from_file, from_memory)
    assert torch.equal(from_file, alpha)


def test_batches_and_iterables_are_taken_apart_in_order() -> None:
    batch = np.stack([PIXELS, PIXELS[::-1], 255 - PIXELS])
    expected = images(*batch)
    assert not torch.equal(expected[0], expected[1])
    for form in (
        batch,
        torch.from_numpy(batch.copy()),
        list(batch),
        iter(batch),
        [batch[:1], (batch[1], batch[2])],
    ):
        assert torch.equal(images(form), expected)
    assert list(each_image([])) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (PIXELS.astype(np.float32), "must be uint8"),
        (torch.zeros(3, 4, 5), "must be uint8"),
        (torch.zeros(4, 5, 3, dtype=torch.bfloat16), "must be uint8"),
        (Image.new("RGB", (0, 5)), "has no pixels"),
        (PIXELS[..., 0], r"the shape of an image must be \[H, W, 3\]"),
        (PIXELS.transpose(2, 0, 1), r"permute\(1, 2, 0\)"),
        (PIXELS[:0], "the shape of an image"),
        (np.zeros((2, 2, 2, 2, 3), dtype=np.uint8), "the shape of an image"),
        (7, "int'?: is not an image"),
        (b"\xff\xd8", "bytes'?: is not an image"),
        ("gone.jpeg", "cannot be read"),
    ],
)
def test_anything_else_is_refused(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        images(value)


def test_truncated_pillow_image_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    Image.fromarray(PIXELS).save(file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(UserError, match="cannot be decoded"):
        images(Image.open(file))
