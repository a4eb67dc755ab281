"""Interface of methods to the trainer: logits, assignment updates, warm-up, state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dl2pa.assignment import MatchSchedule
from dl2pa.methods import METHODS, Method, PrototypeMethod, Targets, assignment_from_vectors

CLASSES, DIM = 6, 3


def points(classes: int = CLASSES, dim: int = DIM) -> Tensor:
    return F.normalize(torch.randn(classes, dim, generator=torch.Generator().manual_seed(5)), dim=1)


def build(**choices: Any) -> PrototypeMethod:
    torch.manual_seed(0)
    return METHODS["dl2pa"].build(points(), METHODS["dl2pa"].options(**choices), None)


def features(count: int = 40) -> Tensor:
    return 4.0 * torch.randn(count, DIM, generator=torch.Generator().manual_seed(6))


def labels(count: int = 40) -> Tensor:
    return torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("loss", "scale"), [("squared_cosine", 1.0), ("cross_entropy", 20.0)])
def test_logits_are_scaled_cosines_to_the_current_class_vectors(loss: str, scale: float) -> None:
    method = build(loss=loss, scale=20.0)
    method.assignment.copy_(torch.tensor([1, 2, 3, 4, 5, 0]))
    method.refresh()
    vectors = points()[[1, 2, 3, 4, 5, 0]]
    assert torch.equal(method.class_vectors(), vectors)
    expected = scale * F.cosine_similarity(features()[:, None], vectors[None], dim=2)
    assert torch.allclose(method.logits(features()), expected, atol=1e-5)


def test_the_initial_assignment_selects_the_class_vectors() -> None:
    sigma = torch.tensor([2, 0, 1, 5, 4, 3])
    method = METHODS["hpn"].build(points(), METHODS["hpn"].options(), sigma)
    assert torch.equal(method.class_vectors(), points()[sigma])


def test_an_update_adapts_predictions_to_the_observed_classes() -> None:
    """Features at the prototypes of other classes are classified correctly after one update."""
    method = build()
    sigma = torch.tensor([3, 0, 4, 1, 5, 2])
    y = labels()
    batch = 2.0 * points()[sigma][y]
    assert (method.logits(batch).argmax(1) == y).float().mean() < 0.5
    method.observe(batch[:20], Targets(y[:20]))
    method.observe(batch[20:], Targets(y[20:]))
    result = method.rematch()
    assert result is not None
    assert result.moved > 0
    assert (method.logits(batch).argmax(1) == y).all()


def test_mixed_labels_are_weighted_by_their_shares() -> None:
    mixed, expected = build(), build()
    share = torch.linspace(0, 1, 40)
    other = labels().roll(3)
    mixed.observe(features(), Targets(labels(), other, share))
    assert expected.statistic is not None
    assert mixed.statistic is not None
    expected.statistic.add(features(), labels(), share)
    expected.statistic.add(features(), other, 1.0 - share)
    assert torch.equal(mixed.statistic.sums, expected.statistic.sums)
    total = mixed.statistic.counts.sum().item() / 2**32
    assert total == pytest.approx(40, abs=1e-6), "a mixed sample counts once in total"


def test_observe_does_not_affect_the_gradient() -> None:
    method, leaf = build(), features().requires_grad_()
    loss = method.loss(leaf, Targets(labels()))
    method.observe(leaf, Targets(labels()))
    loss.backward()
    assert leaf.grad is not None


def test_a_static_assignment_is_never_due() -> None:
    method = build(dynamic=False, schedule=MatchSchedule(every_steps=1))
    method.observe(features(), Targets(labels()))
    assert not method.due_after_step(0, 1)
    assert not method.due_after_epoch(0)
    assert method.rematch() is None
    assert torch.equal(method.class_vectors(), points())


def test_due_follows_the_schedule() -> None:
    method = build(schedule=MatchSchedule(every_steps=3, every_epochs=2))
    assert [method.due_after_step(0, g) for g in range(1, 7)] == [False, False, True, False, False, True]
    assert [method.due_after_epoch(e) for e in range(4)] == [False, True, False, True]


class TestWarmUp:
    """Warm-up: a learned cosine classifier until the first assignment update."""

    def method(self) -> PrototypeMethod:
        return build(schedule=MatchSchedule(warmup_epochs=2), warmup_scale=9.0)

    def test_the_learned_vectors_are_trained_and_predict(self) -> None:
        method = self.method()
        method.begin_epoch(0)
        assert method.warmup is not None
        unit = F.normalize(method.warmup.detach(), dim=1)
        assert torch.equal(method.class_vectors(), unit)
        logits = 9.0 * F.normalize(features(), dim=1) @ unit.T
        assert torch.allclose(method.logits(features()), logits, atol=1e-5)
        loss = method.loss(features(), Targets(labels()))
        assert loss.item() == pytest.approx(F.cross_entropy(logits, labels()).item(), rel=1e-5)
        loss.backward()
        assert method.warmup.grad is not None
        assert method.warmup.grad.abs().max() > 0

    def test_afterward_the_prototypes_predict_and_the_vectors_are_fixed(self) -> None:
        method, plain = self.method(), build()
        method.begin_epoch(2)
        assert method.warmup is not None
        assert torch.equal(method.class_vectors(), points())
        loss = method.loss(features(), Targets(labels()))
        assert torch.equal(loss, plain.loss(features(), Targets(labels())))
        loss.backward()
        assert method.warmup.grad is not None, "DDP waits for a gradient of every parameter"
        assert method.warmup.grad.abs().max() == 0

    def test_the_first_update_uses_only_the_last_warm_up_epoch(self) -> None:
        method = self.method()
        method.begin_epoch(0)
        method.observe(features(), Targets(labels()))
        assert not method.due_after_epoch(0)
        assert method.statistic is not None
        assert method.statistic.counts.sum() == 0
        method.begin_epoch(1)
        method.observe(features(), Targets(labels()))
        assert method.due_after_epoch(1)
        assert method.statistic.counts.sum() > 0

    def test_a_static_assignment_has_no_warm_up(self) -> None:
        static = build(dynamic=False, schedule=MatchSchedule(warmup_epochs=2))
        static.begin_epoch(0)
        assert torch.equal(static.class_vectors(), points())


@pytest.mark.parametrize("warmup", [0, 1])
def test_the_state_dict_determines_all_later_results(warmup: int) -> None:
    schedule = MatchSchedule(warmup_epochs=warmup)
    method, other = build(schedule=schedule), build(schedule=schedule)
    other.prototypes.zero_()
    method.observe(features(), Targets(labels()))
    method.rematch()
    method.observe(features().roll(1, 0), Targets(labels()))
    other.load_state_dict(method.state_dict())
    other.refresh()
    for each in (method, other):
        each.begin_epoch(0)
    assert torch.equal(other.logits(features()), method.logits(features()))
    assert [m and (m.moved, m.objective_after) for m in (other.rematch(),)] == [
        m and (m.moved, m.objective_after) for m in (method.rematch(),)
    ]
    assert torch.equal(other.class_vectors(), method.class_vectors())


class TestPsc:
    """Learned baseline, linear and normalized."""

    def build(self, **choices: Any) -> Method:
        torch.manual_seed(1)
        return METHODS["psc"].build(CLASSES, DIM, METHODS["psc"].options(**choices))

    def test_the_linear_form_is_a_linear_classifier(self) -> None:
        psc = self.build(normalize=False, scale=99.0, label_smoothing=0.1)
        weight, bias = dict(psc.named_parameters())["weight"], dict(psc.named_parameters())["bias"]
        with torch.no_grad():
            bias.copy_(torch.arange(CLASSES).float())
        logits = features() @ weight.T + bias
        assert torch.allclose(psc.logits(features()), logits, atol=1e-5)
        expected = F.cross_entropy(logits, labels(), label_smoothing=0.1)
        assert psc.loss(features(), Targets(labels())).item() == pytest.approx(expected.item(), rel=1e-5)

    def test_the_normalized_form_scales_cosines_and_has_no_bias(self) -> None:
        psc = self.build(scale=14.0)
        parameters = dict(psc.named_parameters())
        assert set(parameters) == {"weight"}
        expected = 14.0 * F.cosine_similarity(features()[:, None], parameters["weight"][None], dim=2)
        assert torch.allclose(psc.logits(features()), expected, atol=1e-5)
        assert torch.allclose(psc.logits(1e3 * features()), psc.logits(features()), atol=1e-5)

    @pytest.mark.parametrize("normalize", [True, False])
    def test_every_parameter_learns(self, normalize: bool) -> None:
        """The published long-tail PSC rows come from a frozen classifier (ALGORITHMS, section 5)."""
        psc = self.build(normalize=normalize)
        psc.loss(features(), Targets(labels())).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in psc.parameters())
        assert psc.rematch() is None
        assert torch.allclose(psc.class_vectors().norm(dim=1), torch.ones(CLASSES))


@pytest.mark.parametrize("width", [1, 2, 7])
def test_an_assignment_from_word_vectors_keeps_similar_classes_together(width: int) -> None:
    """Two groups of words map to two groups of prototypes. Fewer columns than d are padded."""
    angles = torch.cat([torch.linspace(-0.5, 0.5, 5), torch.linspace(-0.5, 0.5, 5) + torch.pi])
    prototypes = torch.stack([angles.cos(), angles.sin()], dim=1)
    generator = torch.Generator().manual_seed(width)
    group = torch.arange(10) % 2
    vectors = 0.3 * torch.randn(10, width, generator=generator) + 8.0 * group[:, None] + 100.0
    sigma = assignment_from_vectors(prototypes, vectors)
    assert sorted(sigma.tolist()) == list(range(10))
    assert len(set((sigma[group == 0] < 5).tolist())) == 1
