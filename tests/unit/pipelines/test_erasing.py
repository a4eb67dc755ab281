import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from pipelines.erasing import apply_erasing, box_mask, draw_erasing
from pipelines.rng import Stream, uniform

MANY = np.arange(20_000)


def torchvision_boxes(count: int, height: int, width: int) -> np.ndarray:
    erase = v2.RandomErasing(p=1.0)
    image = torch.zeros(3, height, width)
    torch.manual_seed(0)
    params = [erase.make_params([image]) for _ in range(count)]
    return np.array([[d["i"], d["j"], d["h"], d["w"]] for d in params if d["v"] is not None])


@pytest.mark.parametrize("probability", (0.0, 0.1, 1.0))
def test_fraction_of_erased_samples_is_the_probability(probability: float) -> None:
    erased = draw_erasing(0, 3, MANY, 224, 224, probability).any(axis=1).mean()
    assert abs(erased - probability) < 5 * np.sqrt(probability * (1 - probability) / len(MANY)) + 1e-9


@pytest.mark.parametrize("size", ((224, 224), (32, 48)), ids=str)
def test_boxes_follow_torchvisions_distribution(size: tuple[int, int]) -> None:
    height, width = size
    boxes = draw_erasing(0, 0, MANY, height, width, 1.0)
    reference = torchvision_boxes(4_000, height, width)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= size).all()
    assert (boxes[:, 2:] < size).all()
    area = boxes[:, 2] * boxes[:, 3] / (height * width)
    slack = 0.5 * (height + width) / (height * width)
    assert area.min() >= 0.02 - slack
    assert area.max() <= 0.33 + slack
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        expected = np.quantile(reference, quantile, axis=0)
        assert np.abs(np.quantile(boxes, quantile, axis=0) - expected).max() <= 0.04 * max(size)


def test_sample_without_a_fitting_box_in_ten_tries_is_not_erased() -> None:
    """In images of height 10, most boxes are too high."""
    boxes = draw_erasing(0, 0, MANY[:4_000], 10, 400, 1.0)
    erased = boxes.any(axis=1)
    assert abs(erased.mean() - len(torchvision_boxes(1_000, 10, 400)) / 1_000) < 0.08
    assert 0.1 < erased.mean() < 0.9
    assert boxes[erased, 2].max() < 10


def test_box_depends_only_on_seed_epoch_and_sample() -> None:
    full = draw_erasing(1, 2, MANY[:500], 64, 64, 0.5)
    order = np.random.default_rng(0).permutation(500)[:99]
    assert np.array_equal(draw_erasing(1, 2, MANY[order], 64, 64, 0.5), full[order])
    for seed, epoch in ((2, 2), (1, 3)):
        assert not np.array_equal(draw_erasing(seed, epoch, MANY[:500], 64, 64, 0.5), full)
    chosen = full.any(axis=1)
    always = draw_erasing(1, 2, MANY[:500], 64, 64, 1.0)
    assert np.array_equal(always[chosen], full[chosen])
    assert np.array_equal(chosen, uniform(1, Stream.ERASE, 2, MANY[:500], 10) < 0.5)


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
def test_only_the_box_is_erased(layout: torch.memory_format) -> None:
    boxes = draw_erasing(0, 0, np.arange(40), 24, 31, 0.5)
    images = torch.randn(40, 3, 24, 31).add_(9.0).contiguous(memory_format=layout)
    pairs = zip(images, boxes.tolist(), strict=True)
    expected = torch.stack([v2.functional.erase(image, *box, torch.zeros(1, 1, 1)) for image, box in pairs])
    mask = box_mask(torch.from_numpy(boxes), 24, 31)
    assert torch.equal(images.masked_fill(mask, 0.0), expected)
    erased = apply_erasing(images, boxes)
    assert torch.equal(erased, expected)
    assert erased.is_contiguous(memory_format=layout)


def test_invalid_inputs_raise_an_error() -> None:
    with pytest.raises(ValueError, match=r"probability is 1\.5"):
        draw_erasing(0, 0, MANY, 8, 8, 1.5)
    with pytest.raises(ValueError, match="2 images need"):
        apply_erasing(torch.zeros(2, 3, 8, 8), np.zeros((3, 4), dtype=np.int64))


@pytest.mark.parametrize("count", (0, 1))
def test_small_batches(count: int) -> None:
    boxes = draw_erasing(0, 0, np.arange(count), 8, 8, 1.0)
    assert boxes.shape == (count, 4)
    assert boxes.dtype == np.int64
    assert apply_erasing(torch.ones(count, 3, 8, 8), boxes).shape == (count, 3, 8, 8)
