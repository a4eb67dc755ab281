import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pipelines.mixing import Mixed, MixParams, apply_mix, draw_mix

BATCH, SHARD, HEIGHT, WIDTH = 16, 4, 13, 17


def draw(step: int, positions: np.ndarray, mixup: float, cutmix: float, shard: int = SHARD) -> MixParams:
    result = draw_mix(7, step, positions, shard, mixup, cutmix, HEIGHT, WIDTH)
    assert result is not None
    return result


def batch(layout: torch.memory_format = torch.channels_last) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, HEIGHT, WIDTH, generator=generator)
    return images.contiguous(memory_format=layout), torch.arange(BATCH) * 10


def steps_of(kind: str) -> list[int]:
    return [step for step in range(40) if draw(step, np.arange(4), 1.0, 1.0).kind == kind]


@pytest.mark.parametrize("world_size", (1, 2, 4))
@pytest.mark.parametrize("kind", ("mixup", "cutmix"))
def test_every_world_size_mixes_the_same_global_batch(kind: str, world_size: int) -> None:
    images, targets = batch()
    for step in steps_of(kind)[:5]:
        full = apply_mix(images, targets, draw(step, np.arange(BATCH), 0.2, 1.0))
        parts: list[Mixed] = []
        for positions in np.split(np.arange(BATCH), world_size):
            rank = slice(positions[0], positions[-1] + 1)
            parts.append(apply_mix(images[rank], targets[rank], draw(step, positions, 0.2, 1.0)))
        for field in ("images", "targets_a", "targets_b", "lam"):
            joined = torch.cat([getattr(part, field) for part in parts])
            assert torch.equal(joined, getattr(full, field)), field
        assert torch.equal(full.targets_a, targets)
        assert full.lam.dtype == torch.float32


@pytest.mark.parametrize("shard", (2, 4, 16))
def test_partners_are_a_permutation_of_each_shard(shard: int) -> None:
    seen: set[int] = set()
    for step in range(100):
        partner = draw(step, np.arange(BATCH), 1.0, 0.0, shard).partner
        assert sorted(partner) == list(range(BATCH))
        assert (partner != np.arange(BATCH)).all()
        assert (partner // shard == np.arange(BATCH) // shard).all()
        seen.add(int(partner[0]))
    assert seen == set(range(1, shard))


def test_sample_in_a_shard_of_one_is_its_own_partner() -> None:
    images, targets = batch()
    mixed = apply_mix(images, targets, draw(0, np.arange(BATCH), 1.0, 0.0, shard=1))
    assert torch.equal(mixed.targets_b, targets)
    torch.testing.assert_close(mixed.images, images)


def test_partners_are_local_indices_for_every_position_order() -> None:
    positions = np.array([9, 11, 8, 10])
    partner = draw(3, positions, 1.0, 0.0).partner
    straight = draw(3, np.arange(8, 12), 1.0, 0.0).partner + 8
    assert np.array_equal(positions[partner], straight[positions - 8])


def test_mixup_and_cutmix_are_equally_likely() -> None:
    assert abs(sum(draw(s, np.arange(4), 0.2, 1.0).kind == "mixup" for s in range(2_000)) - 1_000) < 5 * 22.4
    assert {draw(s, np.arange(4), 0.2, 0.0).kind for s in range(50)} == {"mixup"}
    assert {draw(s, np.arange(4), 0.0, 0.2).kind for s in range(50)} == {"cutmix"}
    assert draw_mix(0, 0, np.arange(4), 4, 0.0, 0.0, 8, 8) is None


@pytest.mark.parametrize("alpha", (0.2, 1.0, 3.0))
def test_weight_is_beta_distributed(alpha: float) -> None:
    lam = draw(0, np.arange(5_000), alpha, 0.0, shard=5_000).lam
    assert lam.dtype == np.float32
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_mixup_is_the_weighted_sum() -> None:
    images, targets = batch()
    mix = draw(0, np.arange(BATCH), 1.0, 0.0)
    mixed = apply_mix(images, targets, mix)
    weight = torch.from_numpy(mix.lam).view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed.images, torch.lerp(images[mix.partner], images, weight))
    assert torch.equal(mixed.targets_b, targets[mix.partner])


def test_cutmix_copies_the_box_and_weights_by_its_area() -> None:
    images, targets = batch()
    mix = draw(0, np.arange(BATCH), 0.0, 1.0)
    mixed = apply_mix(images, targets, mix)
    expected = images.clone()
    for i, (top, left, height, width) in enumerate(mix.boxes):
        box = (slice(None), slice(top, top + height), slice(left, left + width))
        expected[(i, *box)] = images[(mix.partner[i], *box)]
        assert mixed.lam[i].item() == np.float32(1 - height * width / (HEIGHT * WIDTH))
    assert torch.equal(mixed.images, expected)


def test_cutmix_boxes_follow_the_published_rule() -> None:
    """Uniform center, sides of relative length sqrt(1 - lam), clipped: torchvision's formula."""
    mix = draw_mix(0, 1, np.arange(20_000), 20_000, 0.0, 1.0, 64, 48)
    assert mix is not None
    top, left, height, width = mix.boxes.T
    assert min(top.min(), left.min(), height.min(), width.min()) >= 0
    assert (top + height).max() == 64
    assert (left + width).max() == 48
    rng = np.random.default_rng(0)
    half_side = 0.5 * np.sqrt(1 - rng.beta(1, 1, 20_000))
    for size, start, extent in ((64, top, height), (48, left, width)):
        center, reach = rng.integers(0, size, 20_000), (half_side * size).astype(int)
        low, high = np.maximum(center - reach, 0), np.minimum(center + reach, size)
        for actual, reference in ((start, low), (extent, high - low)):
            assert stats.ks_2samp(actual, reference).pvalue > 1e-3


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_layout_and_dtype_are_kept_and_inputs_unchanged(
    layout: torch.memory_format, dtype: torch.dtype
) -> None:
    images, targets = batch(layout)
    images = images.to(dtype)
    before = images.clone()
    for mix in (draw(0, np.arange(BATCH), 1.0, 0.0), draw(0, np.arange(BATCH), 0.0, 1.0)):
        mixed = apply_mix(images, targets, mix).images
        assert mixed.dtype == dtype
        assert mixed.is_contiguous(memory_format=layout)
        assert torch.equal(images, before)


def test_invalid_inputs_raise_an_error() -> None:
    with pytest.raises(ValueError, match="do not form complete shards of 4"):
        draw(0, np.arange(6), 1.0, 0.0)
    with pytest.raises(ValueError, match=r"mixup alpha is -0\.1"):
        draw(0, np.arange(4), -0.1, 0.0)
    images, targets = batch()
    with pytest.raises(ValueError, match="4 partners were drawn for 16 images"):
        apply_mix(images, targets, draw(0, np.arange(4), 1.0, 0.0))
