"""Prototypes from class vectors: preserved angles and rejected vectors."""

from __future__ import annotations

import pytest
import torch

from dl2pa.errors import UserError
from dl2pa.geometry import directions_of_seen, principal_directions, prototypes_from_vectors


def vectors(count: int = 9, width: int = 14) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0)) + 4.0


def test_enough_dimensions_preserve_the_angles_about_the_mean() -> None:
    centered = vectors().double() - vectors().double().mean(dim=0)
    unit = centered / centered.norm(dim=1, keepdim=True)
    points = prototypes_from_vectors(vectors(), 8)
    assert points.dtype == torch.float32
    assert torch.allclose(points.double() @ points.double().T, unit @ unit.T, atol=1e-6)


@pytest.mark.parametrize("dim", [9, 20])
def test_additional_dimensions_are_zero(dim: int) -> None:
    points = prototypes_from_vectors(vectors(), dim)
    assert points.shape == (9, dim)
    assert points[:, 8:].abs().max() < 1e-6
    assert torch.allclose(points.norm(dim=1), torch.ones(9))


def test_fewer_dimensions_keep_the_largest_variance() -> None:
    rows = torch.zeros(8, 3)
    rows[:, 0] = torch.linspace(-0.1, 0.1, 8).roll(3)
    rows[:, 1] = torch.linspace(-9.0, 9.0, 8)
    rows[:, 2] = torch.tensor([3.0, -3.0] * 4)
    points = principal_directions(rows, 2)
    expected = rows[:, 1:] - rows[:, 1:].mean(dim=0)
    expected = expected / expected.norm(dim=1, keepdim=True)
    assert torch.allclose(points @ points.T, (expected @ expected.T).double(), atol=0.02)


def test_rows_of_classes_without_samples_do_not_affect_the_others() -> None:
    rows, seen = vectors().double(), torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    assert torch.equal(directions_of_seen(rows, 3), principal_directions(rows, 3))
    rows[~seen] = 0
    directions = directions_of_seen(rows, 3)
    assert torch.equal(directions[seen], principal_directions(rows[seen], 3))
    assert not directions[~seen].any()
    assert not directions_of_seen(torch.zeros(4, 6), 3).any()


def test_classes_with_the_same_vector_are_rejected() -> None:
    duplicates = vectors()
    duplicates[6] = duplicates[2]
    with pytest.raises(UserError, match="classes 2 and 6 have the same direction") as caught:
        prototypes_from_vectors(duplicates, 5)
    assert caught.value.field == "method.class_vectors"


def test_class_vector_equal_to_the_mean_is_rejected() -> None:
    rows = torch.cat([torch.eye(4), torch.full((1, 4), 1e-8), -torch.eye(4)])
    with pytest.raises(UserError, match="class 4 equals the mean vector"):
        prototypes_from_vectors(rows, 4)
