from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from pipelines.augment_ops import HUE, Op, OpParams, apply_ops
from pipelines.color_jitter import Strengths, draw_jitter
from pipelines.rand_augment import draw_rand
from pipelines.transforms import Transforms, finish

GEOMETRIC = (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE)
MAX_TIES = 2e-4  # as in test_trivial_augment.py
STRONG: Strengths = (0.8, 1.5, 0.7, 0.5)


def pictures(count: int, height: int, width: int) -> Tensor:
    """Noise and smooth gradients, some gray or with a constant channel."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    ramp = np.linspace(0, 255, width)[None, :] * np.linspace(0.2, 1, height)[:, None]
    noise[1::4] = (ramp + noise[1::4] // 16).clip(0, 255).astype(np.uint8)
    noise[2::4] = noise[2::4, :1]
    noise[::7, 1] = 77
    return torch.from_numpy(noise)


def share_of_ties(augmented: Tensor, expected: Tensor) -> float:
    return (augmented != expected).any(0).float().mean().item()


@pytest.mark.parametrize("size", [(64, 64), (33, 47)], ids=str)
@pytest.mark.parametrize("level", [0, 9, 30])
def test_operations_match_torchvision(level: int, size: tuple[int, int]) -> None:
    reference = v2.RandAugment()
    titles = {title.lower(): title for title in reference._AUGMENTATION_SPACE}
    images = pictures(84, *size)
    (draw,) = draw_rand(0, 1, np.arange(84), 1, level, size)
    assert set(draw.op.tolist()) == set(Op)
    differing = 0.0
    for image, result, op, magnitude in zip(
        images, apply_ops(images, draw), draw.op, draw.magnitude, strict=True
    ):
        title = titles[Op(op).name.replace("_", "").lower()]
        values, signed = reference._AUGMENTATION_SPACE[title]
        levels = values(31, *size)
        expected = 0.0 if levels is None else float(levels[level])
        expected = expected * np.sign(magnitude) if signed and magnitude else expected
        whole = title.startswith("Translate")
        assert magnitude == (int(expected) if whole else expected)
        picture = reference._apply_image_or_video_transform(
            image, title, expected, reference.interpolation, reference._fill
        )
        share = share_of_ties(result, picture)
        assert share == 0 or op in GEOMETRIC
        differing += share / len(images)
    assert differing <= MAX_TIES


def test_each_operation_and_sign_is_equally_likely() -> None:
    indices = np.arange(42_000)
    first, second = draw_rand(0, 1, indices, 2, 9, (32, 32))
    for draw in (first, second):
        expected = len(indices) / len(Op)
        assert np.abs(np.bincount(draw.op, minlength=len(Op)) - expected).max() < 5 * np.sqrt(expected)
        rotations = draw.magnitude[draw.op == Op.ROTATE]
        assert set(np.abs(rotations).round(6)) == {9.0}
        assert abs(np.sign(rotations).mean()) < 0.1
    assert abs((first.op == second.op).mean() - 1 / len(Op)) < 0.01


def jittered_by_torchvision(image: Tensor, operations: list[tuple[int, float]]) -> Tensor:
    functional = v2.functional
    for op, change in operations:
        if op == HUE:
            image = functional.adjust_hue(image, change)
        elif op == Op.BRIGHTNESS:
            image = functional.adjust_brightness(image, 1.0 + change)
        elif op == Op.CONTRAST:
            image = functional.adjust_contrast(image, 1.0 + change)
        else:
            image = functional.adjust_saturation(image, 1.0 + change)
    return image


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (1, 1)], ids=str)
def test_color_jitter_matches_torchvision(size: tuple[int, int]) -> None:
    """All four operations in all orders, pixel for pixel."""
    images = pictures(96, *size)
    draws = draw_jitter(3, 2, np.arange(96), STRONG)
    augmented = images
    for draw in draws:
        augmented = apply_ops(augmented, draw)
    for number, image in enumerate(images):
        operations = [(int(draw.op[number]), float(draw.magnitude[number])) for draw in draws]
        assert torch.equal(jittered_by_torchvision(image, operations), augmented[number]), operations


def test_every_hue_matches_torchvision() -> None:
    levels = torch.arange(0, 256, 5, dtype=torch.uint8)
    colors = torch.cartesian_prod(levels, levels, levels).T.reshape(3, len(levels), -1)
    for shift in (-0.5, -0.1, 1e-8, 0.25, 0.5):
        draw = OpParams(np.array([HUE]), np.array([shift]))
        assert torch.equal(apply_ops(colors[None], draw)[0], v2.functional.adjust_hue(colors, shift)), shift


def test_color_changes_are_uniform_and_in_random_order() -> None:
    indices = np.arange(24_000)
    draws = draw_jitter(0, 1, indices, STRONG)
    orders = np.stack([draw.op for draw in draws], axis=1)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)
    ranges = {Op.BRIGHTNESS: (-0.8, 0.8), Op.CONTRAST: (-1.0, 1.5), Op.COLOR: (-0.7, 0.7), HUE: (-0.5, 0.5)}
    changes = np.stack([draw.magnitude for draw in draws], axis=1)
    for op, (low, high) in ranges.items():
        values = changes[orders == op]
        assert len(values) == len(indices)
        shares = np.histogram(values, bins=10, range=(low, high))[0]
        assert shares.sum() == len(indices)
        assert np.abs(shares - 2400).max() < 5 * np.sqrt(2400)


def test_a_strength_of_zero_leaves_the_property_unchanged() -> None:
    draws = draw_jitter(0, 1, np.arange(100), (0.4, 0.0, 0.0, 0.1))
    assert len(draws) == 2
    assert {int(op) for draw in draws for op in draw.op} == {Op.BRIGHTNESS, HUE}


AUGMENTATIONS = {
    "rand augment": {"rand_augment": 3, "rand_magnitude": 20},
    "color jitter": {"color_jitter": STRONG},
    "all": {"trivial_augment": True, "color_jitter": STRONG, "erasing": 0.5},
}


@pytest.mark.parametrize("changes", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_the_result_depends_on_seed_epoch_and_sample_only(changes: dict[str, object]) -> None:
    transforms = Transforms(21, train=True, **changes)  # type: ignore[arg-type]
    images = pictures(40, 21, 21).permute(0, 2, 3, 1).contiguous()
    samples = np.arange(100, 140)
    full = finish(transforms, images, 0, 1, samples)
    order = np.random.default_rng(1).permutation(40)[:13]
    assert torch.equal(finish(transforms, images[order], 0, 1, samples[order]), full[order])
    alone = [finish(transforms, images[i : i + 1], 0, 1, samples[i : i + 1]) for i in range(40)]
    assert torch.equal(torch.cat(alone), full)
    for seed, epoch in ((1, 1), (0, 2)):
        assert not torch.equal(finish(transforms, images, seed, epoch, samples), full)


def test_augmentation_is_applied_in_training_only() -> None:
    images = pictures(8, 16, 16).permute(0, 2, 3, 1).contiguous()
    strong = Transforms(16, train=False, rand_augment=2, color_jitter=STRONG)
    plain = finish(Transforms(16, train=False), images, 0, 0, np.arange(8))
    assert torch.equal(finish(strong, images, 0, 0, np.arange(8)), plain)
