"""Methods with several vectors per class: DNC's clustering and Goto's frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dl2pa.methods import METHODS, Method, Targets
from dl2pa.methods.dnc import balanced_assignment, update_centroids
from dl2pa.methods.goto import orthonormal_rows

Floats = NDArray[np.float64]
CLASSES, COUNT, DIM, BATCH = 5, 3, 8, 90


def unit_rows(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def labels(seed: int = 0, classes: int = CLASSES) -> Tensor:
    return torch.randint(0, classes, (BATCH,), generator=torch.Generator().manual_seed(seed))


def sinkhorn(cosines: Floats) -> Floats:
    """Return the balanced transport of the samples of one class [n, K], in the log domain."""
    n, count = cosines.shape
    logs, rows, columns = cosines / 0.05, np.zeros((n, 1)), np.zeros((1, count))
    for _ in range(20):
        rows = -np.logaddexp.reduce(logs + columns, axis=1, keepdims=True)
        columns = np.log(n / count) - np.logaddexp.reduce(logs + rows, axis=0, keepdims=True)
    return logs + rows + columns


@pytest.mark.parametrize("seed", range(3))
def test_the_assignment_is_that_of_sinkhorn_within_each_class(seed: int) -> None:
    y = labels(seed)
    cosines = 0.4 * torch.rand(BATCH, COUNT, generator=torch.Generator().manual_seed(seed + 50))
    cosines[:, 0] += 0.3  # most are nearest to the first
    assigned = balanced_assignment(cosines, y, CLASSES)
    for c in range(CLASSES):
        members = (y == c).numpy()
        expected = sinkhorn(cosines.double().numpy()[members]).argmax(1)
        assert assigned[members].tolist() == expected.tolist()
    assert (cosines.argmax(1) != assigned).sum() > BATCH / 4, "balancing changes many assignments"


def test_the_assignment_is_balanced_if_the_nearest_is_not() -> None:
    """60 samples of one class, most nearest to sub-centroid 0; the farthest of them go to others."""
    cosines = torch.zeros(60, 3)
    cosines[:, 0] = torch.linspace(0.2, 0.8, 60)
    cosines[:, 1] = torch.linspace(0.0, 0.3, 60).roll(30)
    assigned = balanced_assignment(cosines, torch.zeros(60, dtype=torch.int64), 1)
    counts = torch.bincount(assigned, minlength=3)
    assert (cosines.argmax(dim=1) == 0).sum() > 50
    assert counts.max() - counts.min() <= 6
    assert assigned[-8:].tolist() == [0] * 8


def test_very_different_cosines_do_not_overflow() -> None:
    cosines = torch.tensor([[1.0, -1.0, -1.0]]).repeat(9, 1)
    cosines[0, 1] = cosines[1, 2] = -0.9
    assigned = balanced_assignment(cosines, torch.zeros(9, dtype=torch.int64), 1)
    assert assigned[0] == 1
    assert assigned[1] == 2


def test_the_only_sample_of_a_class_goes_to_the_nearest() -> None:
    """Its balanced plan has equal entries: rounding must not decide."""
    cosines = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) / 3
    assigned = balanced_assignment(cosines, torch.arange(40), 41)
    assert torch.equal(assigned, cosines.argmax(dim=1))


def reference_update(
    centroids: Floats, f: Floats, y: NDArray[np.int64], correct: NDArray[np.bool_], momentum: float
) -> Floats:
    updated = centroids.copy()
    for c in range(len(centroids)):
        samples = np.flatnonzero(y == c)
        if not len(samples):
            continue
        chosen = sinkhorn(f[samples] @ centroids[c].T).argmax(1)
        for k in range(centroids.shape[1]):
            members = samples[(chosen == k) & correct[samples]]
            if len(members):
                mean = f[members].mean(0)
                new = momentum * centroids[c, k] + (1 - momentum) * mean / np.linalg.norm(mean)
                updated[c, k] = new / np.linalg.norm(new)
    return updated


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.999])
def test_sub_centroids_follow_correctly_classified_samples(momentum: float) -> None:
    old, f = unit_rows(CLASSES, COUNT, DIM, seed=1), unit_rows(BATCH, DIM, seed=2)
    y = labels(classes=CLASSES - 1)
    correct = torch.rand(BATCH, generator=torch.Generator().manual_seed(3)) < 0.4
    correct[y == 2] = False
    new = update_centroids(old, f, y, correct, momentum)
    expected = reference_update(
        old.double().numpy(), f.double().numpy(), y.numpy(), correct.numpy(), momentum
    )
    assert np.abs(new.numpy() - expected).max() < 1e-6
    unchanged = (new == old).all(dim=2)
    assert unchanged[2].all(), "no sample of class 2 was classified correctly"
    assert unchanged[CLASSES - 1].all(), "no sample of the last class"
    assert not unchanged[[0, 1, 3]].all()


def test_the_update_does_not_depend_on_the_order_of_the_batch() -> None:
    old, f, y = unit_rows(CLASSES, COUNT, DIM, seed=1), unit_rows(BATCH, DIM, seed=2), labels()
    correct = torch.arange(BATCH) % 3 > 0
    expected = update_centroids(old, f, y, correct, 0.9)
    for seed in range(5):
        order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(update_centroids(old, f[order], y[order], correct[order], 0.9), expected)


def dnc(**choices: Any) -> Method:
    torch.manual_seed(0)
    entry = METHODS["dnc"]
    return entry.build(CLASSES, DIM, entry.options(sub_prototypes=COUNT, **choices))


def test_observe_updates_from_the_current_predictions() -> None:
    method = dnc(centroid_momentum=0.7)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8))
    gain, bias = (dict(method.named_parameters())[f"feature_norm.{n}"] for n in ("weight", "bias"))
    f = 3.0 * torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(4))
    y = method.logits(f).argmax(dim=1)
    y[::2] = labels()[::2]  # about half are correct
    old = dict(method.named_buffers())["centroids"].clone()
    embedded = F.normalize(F.layer_norm(f, (DIM,), gain, bias), dim=1).detach()
    correct = method.logits(f).argmax(dim=1) == y
    assert 0.5 <= correct.float().mean() < 0.8
    expected = update_centroids(old, embedded, y, correct, 0.7)
    method.observe(f, Targets(y))
    new = dict(method.named_buffers())["centroids"]
    assert torch.allclose(new, expected, atol=1e-6)
    assert not torch.equal(new, old)
    assert torch.allclose(new.norm(dim=2), torch.ones(CLASSES, COUNT), atol=1e-6)


def test_a_mixed_sample_counts_for_the_label_with_the_larger_share() -> None:
    f, first, second = torch.randn(BATCH, DIM), labels(1), labels(2)
    share = torch.linspace(0.0, 1.0, BATCH)
    mixed, plain = dnc(), dnc()
    mixed.observe(f, Targets(first, second, share))
    plain.observe(f, Targets(torch.where(share >= 0.5, first, second)))
    assert torch.equal(mixed.state_dict()["centroids"], plain.state_dict()["centroids"])


def test_sub_centroids_find_the_modes_of_a_class() -> None:
    """Three modes in one class: after some batches each has one sub-centroid."""
    modes = F.normalize(torch.eye(DIM)[[0, 2, 5]] + 0.05, dim=1)
    generator = torch.Generator().manual_seed(0)
    centroids = F.normalize(modes.mean(0) + 0.2 * torch.randn(1, 3, DIM, generator=generator), dim=2)
    correct = torch.ones(60, dtype=torch.bool)
    for _ in range(60):
        noise = 0.05 * torch.randn(60, DIM, generator=generator)
        f = F.normalize(modes.repeat(20, 1) + noise, dim=1)
        centroids = update_centroids(centroids, f, torch.zeros(60, dtype=torch.int64), correct, 0.8)
    nearest = (centroids[0] @ modes.T).max(dim=1)
    assert sorted(nearest.indices.tolist()) == [0, 1, 2]
    assert nearest.values.min() > 0.95


@pytest.mark.parametrize("shape", [(4, 3, 3), (6, 1, 5), (3, 4, 9)])
def test_frames_are_orthonormal_and_keep_their_first_direction(shape: tuple[int, int, int]) -> None:
    raw = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7.0
    rows = orthonormal_rows(raw)
    gram = rows @ rows.mT
    assert torch.allclose(gram, torch.eye(shape[1]).expand_as(gram), atol=1e-5)
    assert torch.allclose(rows[:, 0], F.normalize(raw[:, 0], dim=1), atol=1e-6)
    again = orthonormal_rows(rows)
    assert torch.allclose(again, rows, atol=1e-6)
    span = torch.linalg.matrix_rank(torch.cat([raw, rows], dim=1).double(), tol=1e-4)
    assert (span == shape[1]).all()


def goto(**choices: Any) -> Method:
    torch.manual_seed(0)
    entry = METHODS["goto"]
    return entry.build(CLASSES, DIM, entry.options(sub_prototypes=COUNT, **choices))


def test_training_keeps_frames_orthonormal_and_reduces_the_loss() -> None:
    method = goto()
    optimizer = torch.optim.SGD(method.parameters(), lr=2.0, momentum=0.9)
    f, y = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(4)), labels()
    first = method.loss(f, Targets(y)).item()
    for _ in range(15):
        method.loss(f, Targets(y)).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = method.logits(f)
        method.observe(f, Targets(y))
        frames = method.state_dict()["frames"]
        assert torch.allclose(frames @ frames.mT, torch.eye(COUNT).expand(CLASSES, -1, -1), atol=1e-5)
        assert torch.allclose(method.logits(f), before, atol=1e-3), (
            "orthonormalizing does not change predictions"
        )
    assert method.loss(f, Targets(y)).item() < 0.7 * first


def test_two_vectors_separate_two_modes_from_a_class_between_them() -> None:
    """Class 0 has modes at +x and +y, class 1 is between them; one vector per class cannot separate them."""
    torch.manual_seed(1)
    f = torch.eye(3)[[0, 1]].repeat(20, 1)
    between = torch.tensor([[1.0, 1.0, 0.3]]).repeat(20, 1)
    f = F.normalize(torch.cat([f, between]) + 0.05 * torch.randn(60, 3), dim=1)
    y = torch.cat([torch.zeros(40, dtype=torch.int64), torch.ones(20, dtype=torch.int64)])
    accuracy = {}
    for count in (1, 2):
        entry = METHODS["goto"]
        method = entry.build(2, 3, entry.options(sub_prototypes=count))
        optimizer = torch.optim.SGD(method.parameters(), lr=0.5)
        for _ in range(200):
            method.loss(f, Targets(y)).backward()
            optimizer.step()
            optimizer.zero_grad()
            method.observe(f, Targets(y))
        accuracy[count] = (method.logits(f).argmax(dim=1) == y).float().mean().item()
    assert accuracy[2] > 0.99
    assert accuracy[1] < 0.99
