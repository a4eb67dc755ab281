"""Prototypes from class means before the embedding that are then held, and the control that learns from there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from dl2pa.config import merge, parse_config
from dl2pa.config.checks import check_combination
from dl2pa.errors import UserError
from dl2pa.geometry import principal_directions
from dl2pa.methods import PrototypeMethod, Targets
from dl2pa.model.model import build_method, init_prototypes

CLASSES, DIM, WIDTH = 12, 4, 9
HELD: dict[str, Any] = {
    "name": "dl2pa",
    "loss": "cross_entropy",
    "normalize": False,
    "scale": 1.0,
    "match": {
        "statistic": "pooled",
        "refit_cosine": 1.0,
        "rotate": True,
        "warmup_epochs": 1,
        "last_epoch": 1,
    },
}


def rows(count: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def built(**change: Any) -> PrototypeMethod:
    config = parse_config({"model": {"embedding_dim": DIM}, "method": merge(HELD, change)})
    check_combination(config)
    torch.manual_seed(0)
    method = build_method(config, CLASSES, init_prototypes(config, CLASSES), WIDTH)
    assert isinstance(method, PrototypeMethod)
    return method


def warmed_up(method: PrototypeMethod) -> tuple[Tensor, Tensor]:
    """Observe one feature per class in the first epoch, and update; returns embeddings and pooled features."""
    features, pooled = rows(CLASSES, DIM, 1), rows(CLASSES, WIDTH, 2)
    method.begin_epoch(0)
    method.observe(features, Targets(torch.arange(CLASSES)), pooled)
    assert method.due_after_epoch(0)
    assert method.rematch() is not None
    method.begin_epoch(1)
    return features, pooled


@pytest.mark.parametrize("solver", ["linear", "quadratic"])
def test_the_code_has_the_angles_of_the_pooled_class_means(solver: str) -> None:
    """κ = 1: W is W₀ up to the rotation to the class means of the embedding."""
    method = built(match={"solver": solver})
    features, pooled = warmed_up(method)
    expected = principal_directions(pooled, DIM)
    weights = method.weights.double()
    assert torch.allclose(weights @ weights.T, expected @ expected.T, atol=1e-3)
    left, _, right = torch.linalg.svd(expected.T @ features.double())
    assert torch.allclose(weights, expected @ left @ right, atol=1e-3)
    assert not method.due_after_epoch(1), "held from then on"


@pytest.mark.parametrize("refit_cosine", [None, 1.0])
def test_classes_without_images_do_not_affect_the_others(refit_cosine: float | None) -> None:
    """The pooled features of a ReLU have a common direction, in which a zero row is an outlier."""
    method = built(match={"refit_cosine": refit_cosine, "warmup_epochs": 0, "rotate": False})
    pooled, seen = F.normalize(rows(CLASSES, WIDTH, 2).abs() + 0.5, dim=1), torch.arange(CLASSES - 2)
    before, expected = method.weights.clone(), principal_directions(pooled[seen], DIM)
    method.begin_epoch(0)
    method.observe(rows(len(seen), DIM, 1), Targets(seen), pooled[seen])
    assert method.rematch() is not None
    if refit_cosine is not None:
        assert torch.allclose(method.weights[seen].double(), expected, atol=1e-6)
        return
    gain = expected @ method.prototypes.double().T
    best = linear_sum_assignment(gain.numpy(), maximize=True)[1]
    reached = gain[seen, method.assignment[seen]].sum()
    assert float(reached) == pytest.approx(float(gain[seen, best].sum()), abs=1e-6)
    assert not torch.equal(method.weights, before)


def test_the_largest_cosine_of_the_code_is_bounded() -> None:
    method = built(match={"refit_cosine": 0.6})
    _, pooled = warmed_up(method)
    expected = principal_directions(pooled, DIM)
    assert (expected @ expected.T).fill_diagonal_(-1).max() > 0.8
    assert (method.weights @ method.weights.T).fill_diagonal_(-1).max() < 0.61


def test_held_logits_are_dot_products_with_adjustment() -> None:
    method = built(logit_adjustment=1.0)
    warmed_up(method)
    counts = torch.arange(1, CLASSES + 1)
    method.set_class_counts(counts)
    features = 3.0 * rows(5, DIM, 4)
    scores = features @ method.weights.T
    assert torch.allclose(method.logits(features), scores, atol=1e-6)
    expected = F.cross_entropy(scores + (counts / counts.sum()).log(), torch.arange(5))
    assert method.loss(features, Targets(torch.arange(5))).item() == pytest.approx(expected.item(), rel=1e-5)


class TestRelease:
    """The control: the same start, then learned."""

    @pytest.mark.parametrize("normalize", [True, False])
    def test_the_vectors_are_trained_from_the_held_code(self, normalize: bool) -> None:
        method, held = built(release_epoch=1, normalize=normalize), built(normalize=normalize)
        for each in (method, held):
            warmed_up(each)
        features, targets = 3.0 * rows(5, DIM, 4), Targets(torch.arange(5))
        assert torch.allclose(method.logits(features), held.logits(features), atol=1e-6)
        optimizer = torch.optim.SGD(method.parameters(), lr=0.5)
        loss = method.loss(features, targets)
        assert loss.item() == pytest.approx(held.loss(features, targets).item(), rel=1e-6)
        loss.backward()
        optimizer.step()
        method.observe(features, targets, rows(5, WIDTH, 3))
        assert method.loss(features, targets) < loss
        assert torch.equal(method.weights, held.weights), "P and σ stay for the record"
        assert not torch.allclose(method.class_vectors(), held.class_vectors(), atol=1e-3)
        assert torch.allclose(method.class_vectors().norm(dim=1), torch.ones(CLASSES), atol=1e-6)

    def test_before_the_release_no_step_moves_them(self) -> None:
        method = built(release_epoch=2, match={"last_epoch": 2})
        warmed_up(method)
        optimizer = torch.optim.SGD(method.parameters(), lr=0.5, weight_decay=0.1)
        method.loss(rows(5, DIM, 4), Targets(torch.arange(5))).backward()
        optimizer.step()
        method.observe(rows(5, DIM, 4), Targets(torch.arange(5)), rows(5, WIDTH, 3))
        method.begin_epoch(2)
        assert torch.equal(method.head().vectors, method.weights)

    def test_a_resumed_run_keeps_what_was_learned(self) -> None:
        method = built(release_epoch=1)
        warmed_up(method)
        with torch.no_grad():
            assert method.learned is not None
            method.learned += 0.3
        other = built(release_epoch=1)
        other.load_state_dict(copy.deepcopy(method.state_dict()))
        other.refresh()
        other.begin_epoch(1)
        assert torch.equal(other.head().vectors, method.head().vectors)

    @pytest.mark.parametrize("loss", ["squared_cosine", "dot_regression", "ntce"])
    def test_every_loss_trains_them(self, loss: str) -> None:
        method = built(loss=loss, normalize=None, assignment="static", release_epoch=0)
        method.begin_epoch(0)
        method.loss(rows(5, DIM, 4), Targets(torch.arange(5))).backward()
        assert method.learned is not None and method.learned.grad is not None
        assert method.learned.grad.abs().max() > 1e-3

    @pytest.mark.parametrize(
        ("change", "remedy"),
        [
            ({"release_epoch": 0}, "assignment=static"),
            ({"release_epoch": 2, "match": {"last_epoch": None}}, "last_epoch=2"),
            ({"release_epoch": 1, "match": {"last_epoch": 2}}, "last_epoch=1"),
            ({"release_epoch": 1, "match": {"warmup_epochs": 3}}, "warmup_epochs"),
        ],
    )
    def test_updates_after_the_release_are_refused(self, change: dict[str, Any], remedy: str) -> None:
        with pytest.raises(UserError) as caught:
            built(**change)
        assert caught.value.field == "method.release_epoch"
        assert remedy in caught.value.remedy
