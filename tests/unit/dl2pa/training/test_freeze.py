"""Frozen backbones: what changes in frozen epochs, exact resume across the unfreeze, DDP."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dl2pa.backbones import build_embedder, synchronize_norms
from dl2pa.backbones.layers import parameters_before
from dl2pa.config import Config, merge, parse_config
from dl2pa.config.warnings import warnings
from dl2pa.errors import UserError
from dl2pa.model.model import build_model
from dl2pa.training.distributed import World
from dl2pa.training.train_state import TrainState
from pipelines.batch import Batch
from pipelines.sampler import TrainSampler
from pipelines.synthetic import SyntheticPipeline
from support.process_groups import reports_of

CLASSES, EPOCHS = 5, 3


def config(**change: Any) -> Config:
    base: dict[str, Any] = {
        "data": {"dataset": "synthetic", "num_classes": CLASSES, "image_size": 8},
        "model": {"backbone": "resnet8", "embedding_dim": 3, "widths": [4, 4, 4], "freeze_epochs": 1},
        "train": {"batch_size": 8, "epochs": EPOCHS},
        "optim": {"lr": 0.1, "weight_decay": 0.01},
    }
    return parse_config(merge(base, change))


def batches(size: int = 8) -> list[Batch]:
    return list(SyntheticPipeline(CLASSES, size, TrainSampler(16, 8, 0), 0, torch.device("cpu")))


def build(settings: Config, world: World, state: dict[str, Any] | None = None) -> TrainState:
    train_state = TrainState(settings, build_model(settings, CLASSES), world, 2)
    if state is not None:
        train_state.load(state)
    train_state.wrap()
    return train_state


def train(train_state: TrainState, epoch: int) -> None:
    train_state.begin_epoch(epoch)
    train_state.model.train()
    for step, batch in enumerate(batches(), start=2 * epoch):
        train_state.step(batch, step)


def tensors(train_state: TrainState, part: str) -> dict[str, Tensor]:
    state = train_state.model.embedder.get_submodule(part).state_dict()
    return {name: value.clone() for name, value in state.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("optimizer", [{"name": "sgd"}, {"name": "adamw", "lr": 0.01}])
def test_frozen_epochs_change_only_the_head(optimizer: dict[str, Any], alone: World) -> None:
    train_state = build(config(optim=optimizer), alone)
    backbone, head = tensors(train_state, "backbone"), tensors(train_state, "head")
    train(train_state, 0)
    assert same(tensors(train_state, "backbone"), backbone), "weights and BatchNorm statistics"
    assert not same(tensors(train_state, "head"), head)
    train(train_state, 1)
    changed = tensors(train_state, "backbone")
    assert not any(torch.equal(value, backbone[name]) for name, value in changed.items())


def test_a_backbone_frozen_in_all_epochs_never_changes(alone: World) -> None:
    train_state = build(config(model={"freeze_epochs": "all"}), alone)
    backbone = tensors(train_state, "backbone")
    for epoch in range(EPOCHS):
        train(train_state, epoch)
    assert same(tensors(train_state, "backbone"), backbone)
    assert sum(len(group["params"]) for group in train_state.optimizer.param_groups) == 2


def test_layers_before_a_module_never_change(alone: World) -> None:
    settings = config(model={"freeze_before": "blocks.1"}, train={"ema": 0.5, "checkpoint_activations": True})
    train_state = build(settings, alone)
    before = tensors(train_state, "backbone")
    for epoch in range(EPOCHS):
        train(train_state, epoch)
    after = tensors(train_state, "backbone")
    kept = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert kept == {name for name in before if name.startswith(("conv1.", "bn1.", "blocks.0."))}
    optimized = sum(len(group["params"]) for group in train_state.optimizer.param_groups)
    assert optimized == sum(p.requires_grad for p in train_state.model.parameters()) < len(after)
    train_state.sync_buffers()
    averaged = train_state.evaluated.embedder.backbone.state_dict()
    assert all(torch.equal(averaged[name], before[name]) for name in kept)


@pytest.mark.parametrize(
    ("backbone", "name", "frozen", "trained"),
    [
        ("vit_b_32", "encoder.layers.encoder_layer_2", "encoder.dropout", "encoder.ln"),
        ("mobilenet_v3_small", "features.12", "features.11", "features.12"),
        ("densenet121", "features.denseblock4", "features.transition3", "features.norm5"),
        ("swin_t", "features.7", "features.5.0.stochastic_depth", "features.7.0.stochastic_depth"),
    ],
)
def test_parts_before_a_module_are_in_evaluation_mode(
    backbone: str, name: str, frozen: str, trained: str
) -> None:
    with torch.device("meta"):
        embedder = build_embedder(backbone, 4, image_size=64)
    embedder.freeze_before(name)
    embedder.train()
    parts = dict(embedder.backbone.named_modules())
    assert not any(part.training for part in parts[frozen].modules())
    assert all(part.training for part in parts[trained].modules())
    first = next(name for name, p in embedder.backbone.named_parameters() if p.requires_grad)
    assert first.startswith(name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("blocks.7", "is not a module"),
        ("conv1", "is the first layer"),
        ("conv1.weight", "is not a module"),
        ("head", "is not a module"),
        ("blocks.1.", "is not a module"),
    ],
)
def test_a_module_with_nothing_before_it_is_refused(name: str, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        build_model(config(model={"freeze_before": name}), CLASSES)
    assert caught.value.field == "model.freeze_before"
    assert caught.value.remedy == "Use one of: blocks, blocks.1, blocks.2."


def test_no_modules_are_offered_for_a_backbone_without_any() -> None:
    with pytest.raises(UserError, match="Leave it out"):
        parameters_before(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "0")


def statistics(train_state: TrainState, part: str = "backbone") -> dict[str, Tensor]:
    return {name: t for name, t in tensors(train_state, part).items() if "running_" in name}


def test_freeze_norm_keeps_the_statistics_and_trains_the_rest(alone: World) -> None:
    train_state = build(config(model={"freeze_norm": True}, train={"ema": 0.5}), alone)
    backbone = tensors(train_state, "backbone")
    train(train_state, 0)
    assert same(tensors(train_state, "backbone"), backbone), "the first epoch is frozen"
    train(train_state, 1)
    train_state.evaluated.eval()
    train(train_state, 2)
    changed = {
        name for name, t in tensors(train_state, "backbone").items() if not torch.equal(t, backbone[name])
    }
    assert changed == {name for name, _ in train_state.model.embedder.backbone.named_parameters()}
    train_state.sync_buffers()
    evaluated = train_state.evaluated.embedder.backbone.state_dict()
    assert same(statistics(train_state), evaluated)


def test_freeze_norm_leaves_dropout_and_a_new_head_in_training_mode(alone: World) -> None:
    model = {"backbone": "mobilenet_v3_small", "freeze_norm": True, "freeze_epochs": 0}
    backbone = build(config(model=model, data={"image_size": 32}), alone).model.embedder.train().backbone
    norms = [layer for layer in backbone.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms and not any(layer.training for layer in norms)
    assert all(layer.training for layer in backbone.modules() if isinstance(layer, nn.Dropout))
    train_state = build(config(model={"head": "batchnorm", "embedding_dim": 4, "freeze_norm": True}), alone)
    before = statistics(train_state, "head")
    train(train_state, 1)
    assert not any(torch.equal(t, before[name]) for name, t in statistics(train_state, "head").items())


def test_freeze_norm_holds_for_synchronized_layers() -> None:
    embedder = build_embedder("resnet8", 3, widths=(4, 4, 4), image_size=8)
    embedder.freeze_norm = True
    images = torch.randn(4, 3, 8, 8)
    expected = embedder.train()(images)
    synchronize_norms(embedder, "resnet8")
    norms = [layer for layer in embedder.train().modules() if isinstance(layer, nn.SyncBatchNorm)]
    assert norms and not any(layer.training for layer in norms)
    assert torch.equal(embedder(images), expected)


def test_a_frozen_backbone_draws_no_dropout(alone: World) -> None:
    settings = config(model={"backbone": "mobilenet_v3_small"}, data={"image_size": 32})
    train_state = build(settings, alone)
    train_state.model.train()
    backbone = train_state.model.embedder.backbone
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(images), backbone(images))
    train_state.begin_epoch(1)
    train_state.model.train()
    assert backbone.training


@pytest.mark.parametrize("freeze_norm", [False, True])
@pytest.mark.parametrize("stop", [1, 2])
def test_resuming_before_and_after_the_unfreeze_is_exact(stop: int, freeze_norm: bool, alone: World) -> None:
    optim = {"name": "adamw", "lr": 0.01, "layer_decay": 0.7}
    settings = config(optim=optim, train={"ema": 0.9}, model={"freeze_norm": freeze_norm})
    uninterrupted = build(settings, alone)
    for epoch in range(EPOCHS):
        train(uninterrupted, epoch)
    killed = build(settings, alone)
    for epoch in range(stop):
        train(killed, epoch)
    state = copy.deepcopy(killed.state())
    resumed = build(settings, alone, state)
    for epoch in range(stop, EPOCHS):
        train(resumed, epoch)
    for train_state in (uninterrupted, resumed):
        train_state.sync_buffers()  # as before validation
    assert same(uninterrupted.evaluated.state_dict(), resumed.evaluated.state_dict())
    assert same(uninterrupted.model.state_dict(), resumed.model.state_dict())


def test_two_processes_unfreeze_and_resume_exactly(tmp_path: Path) -> None:
    """Without `find_unused_parameters`; stopped after each of the steps."""
    (reports,) = reports_of(Path(__file__).with_name("freeze_ranks.py"), tmp_path).values()
    assert len(reports) == 2
    for report in reports:
        assert set(report["resumed"].values()) == {report["expected"]}
        assert report["calibrated"]


def test_freezing_random_weights_is_noted() -> None:
    for random in (
        {},
        {"freeze_epochs": 0, "freeze_norm": True},
        {"freeze_epochs": 0, "freeze_before": "blocks.1"},
    ):
        assert any("random weights" in text for text in warnings(config(model=random), CLASSES))
        tuned = {**random, "init": "a.pth"}
        assert not any("random weights" in text for text in warnings(config(model=tuned), CLASSES))
