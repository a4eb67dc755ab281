"""Prototypes from class vectors: what is kept of their angles, and which vectors are refused."""

from __future__ import annotations

import pytest
import torch

from dl2pa.errors import UserError
from dl2pa.geometry import principal_directions, prototypes_from_vectors


def vectors(count: int = 9, width: int = 14) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0)) + 4.0


def test_with_room_enough_the_angles_are_those_about_the_mean() -> None:
    centerd = vectors().double() - vectors().double().mean(dim=0)
    unit = centerd / centerd.norm(dim=1, keepdim=True)
    points = prototypes_from_vectors(vectors(), 8)
    assert points.dtype == torch.float32
    assert torch.allclose(points.double() @ points.double().T, unit @ unit.T, atol=1e-6)


@pytest.mark.parametrize("dim", [9, 20])
def test_dimensions_beyond_the_vectors_own_are_zero(dim: int) -> None:
    points = prototypes_from_vectors(vectors(), dim)
    assert points.shape == (9, dim)
    assert points[:, 8:].abs().max() < 1e-6
    assert torch.allclose(points.norm(dim=1), torch.ones(9))


def test_of_fewer_dimensions_those_with_the_largest_variance_stay() -> None:
    rows = torch.zeros(8, 3)
    rows[:, 0] = torch.linspace(-0.1, 0.1, 8).roll(3)
    rows[:, 1] = torch.linspace(-9.0, 9.0, 8)
    rows[:, 2] = torch.tensor([3.0, -3.0] * 4)
    points = principal_directions(rows, 2)
    expected = rows[:, 1:] - rows[:, 1:].mean(dim=0)
    expected = expected / expected.norm(dim=1, keepdim=True)
    assert torch.allclose(points @ points.T, (expected @ expected.T).double(), atol=0.02)


def test_classes_with_the_same_vector_are_named() -> None:
    twins = vectors()
    twins[6] = twins[2]
    with pytest.raises(UserError, match="classes 2 and 6 coincide") as caught:
        prototypes_from_vectors(twins, 5)
    assert caught.value.field == "method.class_vectors"


def test_a_class_in_the_middle_of_all_has_no_direction() -> None:
    rows = torch.cat([torch.eye(4), torch.full((1, 4), 1e-8), -torch.eye(4)])
    with pytest.raises(UserError, match="class 4 is the mean of all"):
        prototypes_from_vectors(rows, 4)
