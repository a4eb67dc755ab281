"""Crop parameters and normalization, compared with torchvision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.functional import normalize, pil_to_tensor

from pipelines.transforms import Transforms, draw_crop_params, draw_flips, finish, random_resized_windows

MANY = np.arange(4000)


def sizes(height: int, width: int, count: int = len(MANY)) -> np.ndarray:
    return np.tile(np.array([height, width]), (count, 1))


def torchvision_windows(count: int, height: int, width: int, transforms: Transforms) -> np.ndarray:
    transform = v2.RandomResizedCrop(8, transforms.crop_scale, transforms.crop_ratio)
    image = torch.empty(3, height, width)
    torch.manual_seed(0)
    params: list[dict[str, Any]] = [transform.make_params([image]) for _ in range(count)]
    return np.array([[d["top"], d["left"], d["height"], d["width"]] for d in params])


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (64, 64), (100, 140)], ids=str)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.6)], ids=str)
def test_crops_follow_torchvisions_distribution(size: tuple[int, int], scale: tuple[float, float]) -> None:
    transforms = Transforms(8, train=True, crop_scale=scale)
    actual = random_resized_windows(transforms, 0, 0, MANY, sizes(*size))
    expected = torchvision_windows(len(MANY), *size, transforms)
    assert (actual[:, :2] >= 0).all()
    assert (actual[:, 2:] > 0).all()
    assert (actual[:, :2] + actual[:, 2:] <= size).all()
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        difference = np.quantile(actual, quantile, axis=0) - np.quantile(expected, quantile, axis=0)
        assert np.abs(difference).max() <= 0.05 * max(size)
    ratio = actual[:, 3] / actual[:, 2]
    area = actual[:, 2] * actual[:, 3] / np.prod(size)
    slack = 1.5 / np.sqrt(np.prod(size) * scale[0])
    assert ratio.min() > 3 / 4 * (1 - 2 * slack)
    assert ratio.max() < 4 / 3 * (1 + 2 * slack)
    assert area.min() > scale[0] * (1 - 2 * slack)
    assert area.max() < scale[1] * (1 + 2 * slack)


@pytest.mark.parametrize("size", [(10, 400), (400, 10), (1, 1000), (1000, 1), (1, 1)], ids=str)
def test_without_a_fitting_crop_a_central_one_is_used(size: tuple[int, int]) -> None:
    transforms = Transforms(8, train=True, crop_scale=(0.9, 1.0))
    (actual,) = np.unique(random_resized_windows(transforms, 0, 0, MANY[:50], sizes(*size, 50)), axis=0)
    (expected,) = np.unique(torchvision_windows(5, *size, transforms), axis=0)
    assert actual.tolist() == expected.tolist()


def test_full_crop_can_be_forced() -> None:
    """With scale and ratio 1, the crop is the image."""
    transforms = Transforms(8, train=True, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    assert np.array_equal(
        random_resized_windows(transforms, 0, 0, MANY[:9], sizes(50, 50, 9)), np.tile([0, 0, 50, 50], (9, 1))
    )


def test_crop_depends_only_on_seed_epoch_sample_and_size() -> None:
    transforms = Transforms(32, train=True)
    full = draw_crop_params(transforms, 1, 2, MANY, sizes(300, 400))
    order = np.random.default_rng(0).permutation(len(MANY))[:77]
    part = draw_crop_params(transforms, 1, 2, MANY[order], sizes(300, 400, 77))
    assert np.array_equal(part.window, full.window[order])
    assert np.array_equal(part.flip, full.flip[order])
    for seed, epoch in ((1, 3), (2, 2)):
        other = draw_crop_params(transforms, seed, epoch, MANY, sizes(300, 400))
        assert (other.window == full.window).all(axis=1).mean() < 0.01
        assert 0.45 < (other.flip == full.flip).mean() < 0.55


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_fraction_of_flipped_samples_is_the_probability(probability: float) -> None:
    flips = draw_flips(Transforms(8, train=True, flip=probability), 0, 0, np.arange(20_000))
    assert abs(flips.mean() - probability) < 0.02 * (0 < probability < 1) + 1e-9


def test_full_image_is_resized_without_a_crop() -> None:
    crop = draw_crop_params(Transforms(32, train=True, crop="none"), 0, 0, MANY[:3], sizes(30, 70, 3))
    assert crop.window.tolist() == [[0, 0, 30, 70]] * 3
    assert crop.resized.tolist() == [[32, 32]] * 3


def odd_sizes() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.concatenate([rng.integers(20, 700, (400, 2)), [[333, 500], [500, 333], [256, 256], [1, 400]]])


@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (256, 256), (33, 32), (40, 17)])
def test_evaluation_crop_matches_torchvision(resize: int, crop: int) -> None:
    """Coordinates are read from an image whose pixel values are its coordinates."""
    measured = odd_sizes()
    params = draw_crop_params(
        Transforms(crop, train=False, eval_resize=resize), 5, 9, np.arange(len(measured)), measured
    )
    assert not params.flip.any()
    for size, window, resized, offset in zip(
        measured.tolist(),
        params.window.tolist(),
        params.resized.tolist(),
        params.offset.tolist(),
        strict=True,
    ):
        assert window == [0, 0, *size]
        expected = v2.functional.resize(torch.empty(1, *size, device="meta"), [resize])
        assert resized == list(expected.shape[1:])
        grid = torch.stack(torch.meshgrid(torch.arange(resized[0]), torch.arange(resized[1]), indexing="ij"))
        cropped = v2.functional.center_crop(grid, [crop])
        assert cropped.shape[1:] == (crop, crop)
        assert offset == cropped[:, 0, 0].tolist()


def test_evaluation_is_independent_of_epoch_and_seed() -> None:
    transforms = Transforms(32, train=False, eval_resize=40, flip=1.0, erasing=1.0, trivial_augment=True)
    a, b = (draw_crop_params(transforms, s, e, MANY[:5], sizes(50, 60, 5)) for s, e in ((0, 0), (3, 4)))
    assert np.array_equal(a.offset, b.offset)
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(finish(transforms, images, 0, 0, MANY[:5]), finish(transforms, images, 3, 4, MANY[:5]))


def test_normalization_matches_torchvision() -> None:
    transforms = Transforms(9, train=False, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 3), dtype=np.uint8)
    images = finish(transforms, torch.from_numpy(pixels), 0, 0, MANY[:2])
    for image, raw in zip(images, pixels, strict=True):
        expected = normalize(pil_to_tensor(Image.fromarray(raw)) / 255, transforms.mean, transforms.std)
        assert torch.allclose(image, expected, atol=1e-5)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_augmentation_depends_on_the_sample_not_its_position() -> None:
    transforms = Transforms(16, train=True, trivial_augment=True, erasing=0.5)
    images = torch.randint(0, 256, (12, 16, 16, 3), dtype=torch.uint8)
    samples = np.arange(100, 112)
    full = finish(transforms, images, 0, 1, samples)
    assert torch.equal(finish(transforms, images[[7, 2]], 0, 1, samples[[7, 2]]), full[[7, 2]])
    assert not torch.equal(finish(transforms, images, 0, 2, samples), full)
