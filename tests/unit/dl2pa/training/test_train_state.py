from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dl2pa.assignment import ClassStatistic
from dl2pa.config import Config, merge, parse_config
from dl2pa.methods.prototypical import PrototypeMethod
from dl2pa.model.model import build_model
from dl2pa.training.distributed import World
from dl2pa.training.train_state import TrainState
from pipelines.batch import Batch
from pipelines.mixing import apply_mix, draw_mix
from pipelines.sampler import TrainSampler
from pipelines.synthetic import SyntheticPipeline

CLASSES = 6


def config(**change: Any) -> Config:
    base: dict[str, Any] = {
        "data": {"dataset": "synthetic", "num_classes": CLASSES, "image_size": 8},
        "model": {"backbone": "resnet8", "embedding_dim": 3, "widths": [4, 4, 4]},
        "train": {"batch_size": 8, "epochs": 4},
        "optim": {"lr": 0.1, "schedule": "constant"},
    }
    return parse_config(merge(base, change))


def build(settings: Config, world: World) -> TrainState:
    train_state = TrainState(settings, build_model(settings, CLASSES), world, 4)
    train_state.wrap()
    train_state.begin_epoch(0)
    train_state.model.train()
    return train_state


def batches() -> list[Batch]:
    return list(SyntheticPipeline(CLASSES, 8, TrainSampler(32, 8, 0), 0, torch.device("cpu")))


def weights(train_state: TrainState) -> Tensor:
    return torch.cat([p.detach().flatten() for p in train_state.model.parameters()])


def test_a_step_equals_sgd_at_the_rate_of_the_step(alone: World) -> None:
    settings = config(optim={"schedule": "step", "milestones": [1], "momentum": 0.0, "weight_decay": 0.0})
    train_state, reference = build(settings, alone), build_model(settings, CLASSES)
    reference.train()
    for step, rate in ((0, 0.1), (4, 0.01)):
        batch = batches()[0]
        loss, _ = reference(batch.images, batch.targets, None, None)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
                parameter -= rate * gradient
        train_state.step(batch, step)
    expected = torch.cat([p.detach().flatten() for p in reference.parameters()])
    assert torch.allclose(weights(train_state), expected, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_pooled_statistic_sums_the_features_of_the_backbone(accumulate: int, alone: World) -> None:
    """In evaluation mode, so that micro-batches do not change the features."""
    match = {"statistic": "pooled", "solver": "quadratic", "rotate": True}
    settings = config(method={"match": match}, train={"accumulate": accumulate})
    train_state = build(settings, alone)
    reference = copy.deepcopy(train_state.model)
    for module in (train_state.model, reference):
        module.eval()
    batch = batches()[0]
    pooled = reference.embedder.backbone(batch.images)
    expected = ClassStatistic(CLASSES, pooled.shape[1])
    expected.add(pooled, batch.targets)
    train_state.step(batch, 0)
    method = train_state.model.method
    assert isinstance(method, PrototypeMethod) and method.pooled is not None and method.statistic is not None
    assert torch.equal(method.pooled.sums, expected.sums) and torch.equal(
        method.pooled.counts, expected.counts
    )
    before = method.prototypes.clone()
    result = train_state.rematch()
    assert result is not None and result.prototypes_stayed is not None
    assert torch.allclose(method.prototypes @ method.prototypes.T, before @ before.T, atol=1e-5)
    assert not torch.allclose(method.prototypes, before, atol=1e-3)
    assert torch.equal(method.weights, method.prototypes[method.assignment])


def test_mixing_affects_loss_and_statistics_by_both_labels(alone: World) -> None:
    settings = config(train={"mixup": 1.0, "cutmix": 1.0})
    train_state, reference = build(settings, alone), build_model(settings, CLASSES)
    reference.train()
    batch = batches()[1]
    draw = draw_mix(0, 5, np.arange(8), 8 // settings.virtual_shards, 1.0, 1.0, 8, 8)
    assert draw is not None
    mixed = apply_mix(batch.images.clone(), batch.targets, draw)
    features = reference.embedder(mixed.images)
    unit = F.normalize(features, dim=1)
    own = 1 - (unit * reference.method.class_vectors()[mixed.targets_a]).sum(1)
    other = 1 - (unit * reference.method.class_vectors()[mixed.targets_b]).sum(1)
    expected = (mixed.lam * own.square() + (1 - mixed.lam) * other.square()).mean()
    train_state.step(batch, 5)
    assert train_state.meter.read() == pytest.approx(expected.item(), abs=1e-5)
    statistic = train_state.model.method.statistic  # pyright: ignore[reportAttributeAccessIssue]
    shares = torch.zeros(CLASSES).index_add_(0, mixed.targets_a, mixed.lam)
    shares.index_add_(0, mixed.targets_b, 1 - mixed.lam)
    assert torch.allclose(statistic.counts.double() / 2**32, shares.double(), atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_restored_state_continues_bit_identically(
    alone: World, precision: str, ema: float, name: str
) -> None:
    settings = config(train={"precision": precision, "ema": ema, "mixup": 0.2}, optim={"name": name})
    whole = build(settings, alone)
    for step, batch in enumerate(batches()[:2]):
        whole.step(batch, step)
    whole.rematch()
    state = copy.deepcopy(whole.state())
    resumed = build(settings, alone)
    resumed.load(state)
    for train_state in (whole, resumed):
        for step, batch in enumerate(batches()[2:], start=2):
            train_state.step(batch, step)
        train_state.rematch()
        train_state.evaluated.eval()
    assert torch.equal(weights(whole), weights(resumed))
    images = batches()[0].images
    assert torch.equal(whole.score(images), resumed.score(images))
    assert torch.equal(whole.evaluated.method.class_vectors(), resumed.evaluated.method.class_vectors())
    assert whole.meter.read() == resumed.meter.read()


@pytest.mark.parametrize(("rule", "power"), [("none", 0), ("linear", 1), ("sqrt", 0.5)])
def test_the_rate_is_scaled_with_the_global_batch(alone: World, rule: str, power: float) -> None:
    settings = config(optim={"lr": 0.1, "lr_scaling": rule, "schedule": "constant"})
    expected = pytest.approx(0.1 * (settings.train.batch_size / 256) ** power)
    train_state = build(settings, alone)
    train_state.step(batches()[0], 0)
    assert train_state.rate(0) == expected
    assert [group["lr"] for group in train_state.optimizer.param_groups] == [expected] * 2


def test_hyperparameters_after_a_load_are_the_configured(alone: World) -> None:
    old = build(config(optim={"momentum": 0.9, "weight_decay": 1e-4}), alone)
    old.step(batches()[0], 0)
    new = build(config(optim={"momentum": 0.0, "weight_decay": 0.0, "lr": 0.02}), alone)
    new.load(old.state())
    before = weights(new).clone()
    batch = batches()[1]
    new.model.train()
    loss, _ = new.model(batch.images, batch.targets, None, None)
    expected = before - 0.02 * torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(new.model.parameters()))]
    )
    new.step(batch, 1)
    assert torch.allclose(weights(new), expected, atol=1e-7)


def test_the_averaged_model_gets_assignment_updates(alone: World) -> None:
    train_state = build(config(train={"ema": 0.5}), alone)
    trail = []
    for step, batch in enumerate(batches()):
        train_state.step(batch, step)
        trail.append(weights(train_state))
    average = trail[0]
    for point in trail[1:]:
        average = 0.5 * average + 0.5 * point
    averaged = torch.cat([p.detach().flatten() for p in train_state.evaluated.parameters()])
    assert torch.allclose(averaged, average, atol=1e-6)
    train_state.rematch()
    assert torch.equal(train_state.evaluated.method.class_vectors(), train_state.model.method.class_vectors())


def test_a_new_average_starts_from_the_loaded_weights(alone: World) -> None:
    old = build(config(), alone)
    old.step(batches()[0], 0)
    new = build(config(train={"ema": 0.9}), alone)
    new.load(old.state())
    assert torch.equal(torch.cat([p.flatten() for p in new.evaluated.parameters()]), weights(old))


@pytest.mark.parametrize("limit", [0.0, 1e-3])
def test_the_gradient_norm_is_reported_and_clipped(alone: World, limit: float) -> None:
    settings = config(optim={"clip_norm": limit, "momentum": 0.0, "weight_decay": 0.0, "lr": 1.0})
    train_state = build(settings, alone)
    before = weights(train_state).clone()
    norm = train_state.step(batches()[0], 0, want_norm=True)
    assert norm is not None
    moved = (weights(train_state) - before).norm().item()
    assert moved == pytest.approx(min(limit, norm.item()) if limit else norm.item(), rel=1e-3)
    assert norm.item() > 1e-3


def test_stochastic_depth_depends_on_seed_and_step_only(alone: World) -> None:
    """The previous state of torch's generator makes no difference."""
    outcomes = []
    for disturbance in (0, 99):
        train_state = build(config(), alone)
        dropout = torch.nn.Dropout(0.5)
        train_state.model.embedder.head = torch.nn.Sequential(dropout, train_state.model.embedder.head)
        again = TrainState(config(), train_state.model, alone, 4)
        torch.manual_seed(disturbance)
        again.step(batches()[0], 0)
        outcomes.append(weights(again))
    assert torch.equal(outcomes[0], outcomes[1])


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_the_optimizers_of_timm_learn_and_resume_exactly(name: str, alone: World) -> None:
    pytest.importorskip("timm")
    optim = {"name": name, "lr": 0.1 if name == "lamb" else 2.0, "weight_decay": 1e-4, "clip_norm": 1.0}
    settings = config(optim=optim, train={"accumulate": 2})
    whole, cut = build(settings, alone), build(settings, alone)
    start = weights(whole).clone()
    for step, batch in enumerate(batches()):
        whole.step(batch, step)
        if step < 2:
            cut.step(batch, step)
    resumed = build(settings, alone)
    resumed.load(copy.deepcopy(cut.state()))
    for step, batch in list(enumerate(batches()))[2:]:
        resumed.step(batch, step)
    assert torch.equal(weights(whole), weights(resumed))
    assert not torch.allclose(weights(whole), start, atol=1e-3)


class TestReleasedCode:
    """The averaged model of a code that is matched after epoch 0, held in epoch 1 and learned from epoch 2 on."""

    def settings(self) -> Config:
        match = {
            "statistic": "pooled",
            "refit_cosine": 1.0,
            "rotate": True,
            "warmup_epochs": 1,
            "last_epoch": 1,
        }
        method = {
            "loss": "cross_entropy",
            "normalize": False,
            "scale": 1.0,
            "release_epoch": 2,
            "match": match,
        }
        return config(method=method, train={"ema": 0.75})

    def methods(self, train_state: TrainState) -> tuple[PrototypeMethod, PrototypeMethod]:
        """The trained method and its averaged copy."""
        trained, averaged = train_state.model.method, train_state.evaluated.method
        assert isinstance(trained, PrototypeMethod) and isinstance(averaged, PrototypeMethod)
        return trained, averaged

    def run(self, train_state: TrainState, steps: range, trail: list[Tensor] | None = None) -> None:
        """Two steps per epoch; `trail` receives the learned vectors after each step."""
        for step in steps:
            if step % 2 == 0:
                train_state.begin_epoch(step // 2)
            train_state.step(batches()[step % 4], step)
            trained, _ = self.methods(train_state)
            if trail is not None and trained.learned is not None:
                trail.append(trained.learned.detach().clone())
            if step == 1:
                train_state.rematch()

    def test_it_is_exactly_the_matched_code_until_the_release(self, alone: World) -> None:
        train_state = build(self.settings(), alone)
        self.run(train_state, range(1))
        trained, averaged = self.methods(train_state)
        before = trained.weights.clone()
        self.run(train_state, range(1, 2))
        code = trained.prototypes[trained.assignment]
        assert not torch.allclose(code, before, atol=1e-2)
        for steps, epoch in ((range(0), 1), (range(2, 4), 2)):
            self.run(train_state, steps)
            train_state.begin_epoch(epoch)  # the validation after the steps uses the coming epoch
            assert averaged.learned is not None
            for vectors in (averaged.head().vectors, averaged.weights, averaged.learned):
                assert torch.equal(vectors, code)
            assert averaged.head().bias is None

    def test_it_averages_the_learned_vectors_from_then_on(self, alone: World) -> None:
        train_state, trail = build(self.settings(), alone), list[Tensor]()
        self.run(train_state, range(4))
        trained, averaged = self.methods(train_state)
        expected = trained.weights.clone()
        self.run(train_state, range(4, 8), trail)
        for learned in trail:
            expected = 0.75 * expected + 0.25 * learned
        assert torch.allclose(averaged.head().vectors, expected, atol=1e-6)
        assert not torch.allclose(expected, trail[-1], atol=1e-4)
        assert torch.equal(averaged.weights, trained.weights), "the code stays for the record"

    @pytest.mark.parametrize("stop", [2, 3, 4, 5])
    def test_it_continues_with_the_same_bits(self, alone: World, stop: int) -> None:
        """Stops after the matching, while the code is held, at the release and after it."""
        whole, cut = build(self.settings(), alone), build(self.settings(), alone)
        self.run(whole, range(8))
        self.run(cut, range(stop))
        resumed = build(self.settings(), alone)
        resumed.load(copy.deepcopy(cut.state()))
        resumed.begin_epoch(stop // 2)
        self.run(resumed, range(stop, 8))
        for one, other in zip(self.methods(whole), self.methods(resumed), strict=True):
            assert torch.equal(one.head().vectors, other.head().vectors)
        for train_state in (whole, resumed):
            train_state.sync_buffers()
        for (name, value), other in zip(
            whole.evaluated.state_dict().items(), resumed.evaluated.state_dict().values(), strict=True
        ):
            assert torch.equal(value, other), name
