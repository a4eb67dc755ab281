"""Cross-entropy over the own class, its nearest prototypes and random classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dl2pa.config import parse_config
from dl2pa.methods import Method, PrototypeMethod, Targets
from dl2pa.methods.negatives import nearest_classes, sampled_cross_entropy
from dl2pa.model.head import ClassifierHead
from dl2pa.model.model import build_method, init_prototypes
from dl2pa.training.negatives import draw_classes, with_negatives

CLASSES, DIM, BATCH = 23, 6, 8
LABELS = torch.arange(BATCH) * 2
MIXED = Targets(LABELS, LABELS.flip(0) + 1, torch.linspace(0.1, 0.9, BATCH))


def rows(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def built(**method: Any) -> Method:
    config = parse_config({"model": {"embedding_dim": DIM}, "method": method})
    torch.manual_seed(0)
    return build_method(config, CLASSES, init_prototypes(config, CLASSES))


def reference(z: Tensor, y: int, near: list[int], drawn: list[int]) -> float:
    """The formula of the module, term by term."""
    known = {y, *near}
    random = [j for j in drawn if j not in known]
    total = z[y].exp() + sum(z[j].exp() for j in near)
    if random:
        total = total + (CLASSES - len(known)) / len(random) * sum(z[j].exp() for j in random)
    return float(total.log() - z[y])


@pytest.mark.parametrize(("neighbors", "count"), [(3, 5), (0, 4), (4, 0), (3, 2)])
def test_the_loss_equals_its_formula(neighbors: int, count: int) -> None:
    vectors, features, adjustment = rows(CLASSES, 1), 2.0 * rows(BATCH, 2), torch.linspace(-1, 1, CLASSES)
    table = nearest_classes(vectors, neighbors) if neighbors else None
    drawn = torch.from_numpy(draw_classes(0, BATCH, count, CLASSES, 0, 7)) if count else None
    head, targets = ClassifierHead(vectors, 5.0), Targets(LABELS, negatives=drawn)
    loss = sampled_cross_entropy(head, features, targets, table, 0.4, adjustment)
    z = head.logits(features).double() + adjustment.double()
    values = []
    for i, y in enumerate(LABELS.tolist()):
        z[i, y] -= 0.4
        near = [] if table is None else table[y].tolist()
        values.append(reference(z[i], y, near, [] if drawn is None else drawn[i].tolist()))
    assert loss.item() == pytest.approx(np.mean(values), rel=1e-5)


@pytest.mark.parametrize("q", [0.0, 0.7])
@pytest.mark.parametrize("targets", [Targets(LABELS), MIXED])
@pytest.mark.parametrize("normalize", [True, False])
def test_drawing_all_classes_gives_the_full_cross_entropy(
    targets: Targets, normalize: bool, q: float
) -> None:
    choices: dict[str, Any] = {"name": "dl2pa", "loss": "cross_entropy", "scale": 3.0, "normalize": normalize}
    choices["logit_adjustment"] = 1.0
    full = built(**choices, gce_q=q)
    sampled = built(**choices, gce_q=q, negatives={"neighbors": 4, "random": CLASSES})
    counts = torch.arange(1, CLASSES + 1)
    for method in (full, sampled):
        method.set_class_counts(counts)
    gradients = []
    for method in (full, sampled):
        leaf = (3.0 * rows(BATCH, 5)).requires_grad_()
        loss = method.loss(leaf, with_negatives(method, targets, 0, 3))
        loss.backward()
        assert leaf.grad is not None
        gradients += [loss.detach().view(1), leaf.grad.flatten()]
    assert torch.allclose(torch.cat(gradients[:2]), torch.cat(gradients[2:]), atol=1e-5)


def test_the_estimate_of_the_denominator_is_unbiased() -> None:
    vectors, features = rows(CLASSES, 1), rows(BATCH, 2)
    head, table = ClassifierHead(vectors, 2.0), nearest_classes(vectors, 2)
    z = head.logits(features).double()
    own = z[torch.arange(BATCH), LABELS]
    ratios = torch.zeros(BATCH, dtype=torch.float64)
    steps = 3000
    for step in range(steps):
        drawn = torch.from_numpy(draw_classes(0, BATCH, 8, CLASSES, 1, step))
        for i in range(0, BATCH, 4):
            targets = Targets(LABELS[i : i + 1], negatives=drawn[i : i + 1])
            loss = sampled_cross_entropy(head, features[i : i + 1], targets, table)
            ratios[i] += (loss.double() + own[i]).exp() / z[i].exp().sum() / steps
    assert torch.allclose(ratios[::4], torch.ones(2, dtype=torch.float64), atol=0.02)


def test_no_gradient_reaches_held_vectors_and_only_selected_learned_ones() -> None:
    choices: dict[str, Any] = {"name": "dl2pa", "loss": "cross_entropy", "assignment": "static", "scale": 5.0}
    held = built(**choices, negatives={"neighbors": 2, "random": 3})
    assert not list(held.parameters())
    released = built(**choices, release_epoch=0, negatives={"neighbors": 2, "random": 3})
    released.begin_epoch(0)
    drawn = with_negatives(released, Targets(LABELS[:2]), 0, 0)
    released.loss(rows(2, 5), drawn).backward()
    assert isinstance(released, PrototypeMethod) and released.learned is not None
    assert released.neighbors is not None and drawn.negatives is not None
    assert released.learned.grad is not None
    touched = released.learned.grad.norm(dim=1).nonzero().flatten().tolist()
    selected = {*LABELS[:2].tolist(), *released.neighbors[LABELS[:2]].flatten().tolist()}
    assert set(touched) == selected | set(drawn.negatives.flatten().tolist())


@pytest.mark.parametrize("num_classes", [CLASSES, 10**6])
def test_the_draw_depends_only_on_seed_step_and_position(num_classes: int) -> None:
    whole = draw_classes(0, 24, 6, num_classes, 3, 41)
    parts = [draw_classes(first, 8, 6, num_classes, 3, 41) for first in (0, 8, 16)]
    assert np.array_equal(np.concatenate(parts), whole), "the same for every number of processes"
    assert all(len(set(row)) == 6 for row in whole.tolist())
    assert not np.array_equal(whole, draw_classes(0, 24, 6, num_classes, 3, 42))
    assert not np.array_equal(whole, draw_classes(0, 24, 6, num_classes, 4, 41))


def test_all_classes_are_drawn_equally_often() -> None:
    counts = np.bincount(np.concatenate([draw_classes(3, 1, 5, CLASSES, 0, s)[0] for s in range(2000)]))
    assert np.abs(counts / counts.mean() - 1).max() < 0.2
    within = np.bincount(draw_classes(0, 2 * CLASSES, 5, CLASSES, 0, 1).ravel())
    assert set(within.tolist()) == {10}


def test_micro_batches_have_the_draws_of_their_images() -> None:
    targets = with_negatives(built(name="psc", negatives={"random": 5}), Targets(LABELS), 0, 9)
    assert targets.negatives is not None
    parts = [part.negatives for part in targets.split(4) if part.negatives is not None]
    assert torch.equal(torch.cat(parts), targets.negatives)


def test_neighbors_are_exact_and_ties_go_to_the_smaller_class(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = rows(40, 3)
    expected = (
        (vectors.double() @ vectors.double().T).fill_diagonal_(-2).topk(5, dim=1).indices.sort(dim=1).values
    )
    assert torch.equal(nearest_classes(vectors, 5), expected)
    monkeypatch.setattr("dl2pa.methods.negatives._BLOCK_SCORES", 100)
    assert torch.equal(nearest_classes(vectors, 5), expected), "in blocks"
    simplex = torch.eye(7)
    assert nearest_classes(simplex, 2)[:3].tolist() == [[1, 2], [0, 2], [0, 1]]
    assert nearest_classes(simplex, 6).tolist() == [[j for j in range(7) if j != i] for i in range(7)]


def test_an_assignment_update_recomputes_the_neighbors() -> None:
    method = built(name="dl2pa", loss="cross_entropy", match={"solver": "linear"}, negatives={"neighbors": 3})
    assert isinstance(method, PrototypeMethod) and method.neighbors is not None
    before = method.neighbors.clone()
    method.observe(method.prototypes.flip(0), Targets(torch.arange(CLASSES)))
    result = method.rematch()
    assert result is not None and result.moved > 0
    assert not torch.equal(method.neighbors, before)
    assert torch.equal(method.neighbors, nearest_classes(method.weights, 3))


def test_the_warm_up_of_the_learned_classifier_is_sampled_too() -> None:
    method = built(
        name="dl2pa",
        loss="cross_entropy",
        match={"warmup_epochs": 1},
        negatives={"neighbors": 3, "random": 4},
    )
    method.begin_epoch(0)
    targets = with_negatives(method, Targets(LABELS), 0, 0)
    method.loss(rows(BATCH, 1), targets).backward()
    assert isinstance(method, PrototypeMethod) and method.warmup is not None and targets.negatives is not None
    assert method.warmup.grad is not None
    touched = set(method.warmup.grad.norm(dim=1).nonzero().flatten().tolist())
    assert touched == {*LABELS.tolist(), *targets.negatives.flatten().tolist()}


@pytest.mark.parametrize("loss", ["squared_cosine", "dot_regression"])
def test_other_losses_ignore_the_options_of_cross_entropy(loss: str) -> None:
    """Also where more are configured than there are classes: a warning says that they are not used."""
    method = built(loss=loss, negatives={"neighbors": 5000, "random": 5000}, gce_q=0.5)
    assert method.options.gce_q == 0.0, "also during a warm-up"
    assert method.neighbors is None
    assert with_negatives(method, MIXED, 0, 0).negatives is None
