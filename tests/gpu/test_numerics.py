"""Results on the GPU equal those on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic")


def test_statistic_equals_the_cpu_statistic(device: torch.device) -> None:
    from dl2pa.assignment import ClassStatistic

    features = torch.randn(512, 16).round(decimals=3)
    features /= features.norm(dim=1, keepdim=True)
    labels = torch.randint(0, 7, (512,))
    share = torch.rand(512)
    here, there = ClassStatistic(7, 16), ClassStatistic(7, 16).to(device)
    here.add(features, labels, share)
    there.add(features.to(device), labels.to(device), share.to(device))
    assert torch.equal(here.counts, there.counts.cpu())
    # Normalization may round differently on the device: by a bit of float32 a sample.
    assert (here.sums - there.sums.cpu()).abs().max() < 512 * 2**10


def test_assignment_equals_the_cpu_assignment(
    device: torch.device, rehearsing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates found on the GPU, with TF32 allowed elsewhere, give the same permutation."""
    from dl2pa.assignment import AssignmentSolver

    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    count = 500 if rehearsing else 5000
    random = np.random.default_rng(0)
    points = random.standard_normal((count, 128))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    shared = random.standard_normal((1, 128))
    for rows in (0.1 * random.standard_normal((count, 128)) + shared, points[::-1] + 0.05 * shared):
        current = random.permutation(count)
        expected = AssignmentSolver().solve(rows, points, current)
        found = AssignmentSolver().solve(rows, points, current, device)
        assert np.array_equal(found.assignment, expected.assignment)


def test_trivial_augment_pixels_equal_the_cpu_pixels(device: torch.device) -> None:
    from pipelines.augment_ops import apply_ops
    from pipelines.trivial_augment import draw_trivial

    images = torch.randint(0, 256, (128, 3, 64, 64), dtype=torch.uint8)
    draw = draw_trivial(0, 0, np.arange(128))
    there = apply_ops(images.to(device), draw).cpu()
    assert (apply_ops(images, draw) != there).float().mean() < 1e-3


@pytest.mark.parametrize("kind", ["rand augment", "color jitter"])
def test_augmented_pixels_equal_the_cpu_pixels(kind: str, device: torch.device) -> None:
    from pipelines.augment_ops import apply_ops
    from pipelines.color_jitter import draw_jitter
    from pipelines.rand_augment import draw_rand

    images = torch.randint(0, 256, (128, 3, 64, 64), dtype=torch.uint8)
    samples = np.arange(128)
    if kind == "rand augment":
        draws = draw_rand(0, 0, samples, 2, 9, (64, 64))
    else:
        draws = draw_jitter(0, 0, samples, (0.4, 0.4, 0.4, 0.1))
    for draw in draws:
        here, there = apply_ops(images, draw), apply_ops(images.to(device), draw).cpu()
        # A product that rounds differently changes a level by one, and a translation by a pixel.
        assert (here != there).float().mean() < 1e-3
        images = here
