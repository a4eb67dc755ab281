import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from pipelines.augment_ops import Op, apply_ops
from pipelines.trivial_augment import NUM_LEVELS, Levels, draw_levels, draw_trivial

GEOMETRIC = (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE)
# Measured: 0 at all tested sizes up to 500x331. On other processors, torchvision's matrix product may round
# differently and change exact ties between two pixels: 2.3e-5 at 224x224 with fused operations.
MAX_TIES = 2e-4
SIZES = ((224, 224), (33, 47), (2, 5))


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Noise, gradients and uniform areas of full and narrow range, some with a constant channel."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    ramp = np.linspace(0, 255, width)[None, :] * np.linspace(0.2, 1, height)[:, None]
    noise[1::4] = (ramp + noise[1::4] // 16).clip(0, 255).astype(np.uint8)
    noise[2::4] = noise[2::4] // 3 + 60
    noise[3::4] = (noise[3::4] > 128) * np.uint8(199)
    noise[::7, 1] = 77
    return torch.from_numpy(noise)


def every_level(op: Op, stride: int) -> Levels:
    levels = np.repeat(np.arange(0, NUM_LEVELS, stride), 2)
    return Levels(np.full(len(levels), int(op)), levels, np.tile([1, -1], len(levels) // 2))


def torchvision_result(image: Tensor, op: Op, level: int, sign: int) -> Tensor:
    reference = v2.TrivialAugmentWide()
    name = op.name.replace("_", "").lower()
    title = next(title for title in reference._AUGMENTATION_SPACE if title.lower() == name)
    magnitudes, signed = reference._AUGMENTATION_SPACE[title]
    values = magnitudes(NUM_LEVELS, *image.shape[-2:])
    magnitude = 0.0 if values is None else float(values[level])
    return reference._apply_image_or_video_transform(
        image, title, sign * magnitude if signed else magnitude, reference.interpolation, reference._fill
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("op", Op, ids=lambda op: op.name)
def test_every_operation_and_magnitude_matches_torchvision(op: Op, size: tuple[int, int]) -> None:
    """Large images are tested with every magnitude only in the geometric operations."""
    draw = every_level(op, stride=1 if op in GEOMETRIC or size != SIZES[0] else 6)
    images = pictures(len(draw.op), *size)
    augmented = apply_ops(images, draw.params())
    differing = 0.0
    for image, result, level, sign in zip(images, augmented, draw.level, draw.sign, strict=True):
        reference = torchvision_result(image, op, int(level), int(sign))
        differing += (reference != result).any(0).float().mean().item() / len(images)
    assert differing <= (MAX_TIES if op in GEOMETRIC else 0.0)


@pytest.mark.parametrize("size", ((40, 52), (31, 17)), ids=str)
def test_result_is_independent_of_the_batch(size: tuple[int, int]) -> None:
    indices = np.arange(200)
    images = pictures(200, *size)
    full = apply_ops(images, draw_trivial(3, 5, indices))
    alone = [apply_ops(images[i : i + 1], draw_trivial(3, 5, indices[i : i + 1])) for i in range(200)]
    assert torch.equal(torch.cat(alone), full)
    order = np.random.default_rng(1).permutation(200)[:137]
    assert torch.equal(apply_ops(images[order], draw_trivial(3, 5, indices[order])), full[order])


def test_result_is_independent_of_the_number_of_threads() -> None:
    images, draw = pictures(56, 67, 71), draw_trivial(0, 0, np.arange(56))
    alone = apply_ops(images, draw)
    torch.set_num_threads(3)
    assert torch.equal(apply_ops(images, draw), alone)


def test_memory_format_is_kept() -> None:
    images = pictures(28, 24, 20)
    draw = draw_trivial(0, 0, np.arange(28))
    before = images.clone()
    planar = apply_ops(images, draw)
    interleaved = apply_ops(images.contiguous(memory_format=torch.channels_last), draw)
    assert planar.is_contiguous()
    assert interleaved.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(planar, interleaved)
    wider = torch.zeros(28, 3, 24, 30, dtype=torch.uint8)
    wider[..., 5:25] = images
    assert torch.equal(apply_ops(wider[..., 5:25], draw), planar)
    assert torch.equal(images, before)


def test_parameters_are_uniform_and_independent_of_the_batch() -> None:
    indices = np.arange(42_000)
    draw = draw_levels(0, 1, indices)
    for values, count in ((draw.op, len(Op)), (draw.level, NUM_LEVELS), ((draw.sign + 1) // 2, 2)):
        expected = len(indices) / count
        frequency = np.bincount(values, minlength=count)
        assert len(frequency) == count
        assert np.abs(frequency - expected).max() < 5 * np.sqrt(expected)
    assert abs(np.corrcoef(draw.op, draw.level)[0, 1]) < 0.02
    some = draw_levels(0, 1, indices[[99, 7, 12_345]])
    assert [list(values) for values in (some.op, some.level, some.sign)] == [
        list(values[[99, 7, 12_345]]) for values in (draw.op, draw.level, draw.sign)
    ]
    for other in (draw_levels(1, 1, indices), draw_levels(0, 2, indices)):
        assert 0.05 < (other.op == draw.op).mean() < 0.1


def test_empty_batch() -> None:
    empty = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    assert apply_ops(empty, draw_trivial(0, 0, np.arange(0))).shape == empty.shape


def test_invalid_inputs_raise_an_error() -> None:
    draw = draw_trivial(0, 0, np.arange(2))
    with pytest.raises(ValueError, match=r"torch\.float32.*before the images are normalized"):
        apply_ops(torch.zeros(2, 3, 8, 8), draw)
    with pytest.raises(ValueError, match="2 operations were drawn for 3 images"):
        apply_ops(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), draw)
