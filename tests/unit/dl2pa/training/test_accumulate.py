"""Micro-batches: the batches and sums of a step without them, exact resume, and the decision of `auto`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dl2pa.config import Config, merge, parse_config
from dl2pa.errors import UserError
from dl2pa.model.model import build_model
from dl2pa.training.accumulate import count_for_size, fewest_that_fit, possible_counts
from dl2pa.training.distributed import World
from dl2pa.training.train_state import TrainState
from pipelines.batch import Batch
from pipelines.sampler import TrainSampler
from pipelines.synthetic import SyntheticPipeline
from support.process_groups import Reports, reports_of

CLASSES, SIDE, BATCH = 5, 32, 16


def config(**change: Any) -> Config:
    base: dict[str, Any] = {
        "data": {"dataset": "synthetic", "num_classes": CLASSES, "image_size": SIDE},
        "model": {"backbone": "resnet8", "embedding_dim": 3, "widths": [4, 4, 4]},
        "train": {"batch_size": BATCH, "epochs": 4, "mixup": 0.4, "ema": 0.9},
        "optim": {"lr": 0.05, "schedule": "constant"},
    }
    return parse_config(merge(base, change))


def build(settings: Config, world: World, state: dict[str, Any] | None = None) -> TrainState:
    train_state = TrainState(settings, build_model(settings, CLASSES), world, 4)
    if state is not None:
        train_state.load(copy.deepcopy(state))
    train_state.wrap()
    train_state.begin_epoch(0)
    train_state.model.train()
    return train_state


def batches() -> list[Batch]:
    sampler = TrainSampler(4 * BATCH, BATCH, 0)
    return list(SyntheticPipeline(CLASSES, SIDE, sampler, 0, torch.device("cpu")))


def train(train_state: TrainState, first: int, last: int) -> None:
    for step, batch in list(enumerate(batches()))[first:last]:
        train_state.step(batch, step)


def assert_same(one: TrainState, other: TrainState) -> None:
    assert one.average is not None and other.average is not None
    one.sync_buffers()
    other.sync_buffers()
    for a, b in ((one.model, other.model), (one.average.module, other.average.module)):
        first, second = a.state_dict(), b.state_dict()
        assert not [name for name in first if not torch.equal(first[name], second[name])]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Reports of accumulate_ranks.py."""
    program = Path(__file__).with_name("accumulate_ranks.py")
    return reports_of(program, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("method", ["squared cosine", "dot regression"])
def test_micro_batches_equal_the_batches_of_as_many_processes(method: str, reports: Reports) -> None:
    """Mixed images, labels and weights bit for bit; losses up to rounding, with dropout, without BatchNorm."""
    runs = {size: [report["runs"][method] for report in ranks] for size, ranks in reports.items()}

    def in_order(size: int) -> list[str]:
        share = 4 // size
        steps = range(4)
        return [
            run["inputs"][step * share + number]
            for step in steps
            for run in runs[size]
            for number in range(share)
        ]

    assert len(set(in_order(4))) == 16
    assert in_order(1) == in_order(2) == in_order(4)
    for size in (1, 2):
        assert runs[size][0]["losses"] == pytest.approx(runs[4][0]["losses"], rel=1e-4)
    assert len(set(runs[4][0]["losses"])) == 4


def test_the_class_statistic_has_the_same_sums(reports: Reports) -> None:
    """Bit for bit in the first step; later the weights differ by rounding."""
    sums = {size: ranks[0]["runs"]["squared cosine"]["sums"] for size, ranks in reports.items()}
    assert len(sums[1]) == 4
    assert sums[1][0] == sums[2][0] == sums[4][0]


def test_resuming_and_checkpointing_with_micro_batches_are_exact(
    reports: Reports,
) -> None:
    """Two processes with two micro-batches each."""
    assert [report["differences"] for report in reports[2]] == [[], []]


def test_every_process_decides_the_same_number(reports: Reports) -> None:
    """One of two has memory for 4 images of its 16."""
    assert [report["decided"] for report in reports[2]] == [4, 4]


@pytest.mark.parametrize("loss", ["squared_cosine", "dot_regression", "cross_entropy"])
def test_gradients_are_those_of_the_whole_batch(loss: str, alone: World) -> None:
    """Without BatchNorm. Clipping, the norm and the moving average follow once per step."""
    optim = {"clip_norm": 0.5, "momentum": 0.0, "lr": 1.0}
    states = []
    for count in (1, 4):
        settings = config(train={"accumulate": count}, method={"loss": loss}, optim=optim)
        train_state = TrainState(settings, build_model(settings, CLASSES), alone, 4)
        train_state.model.embedder.backbone.eval()
        norm = train_state.step(batches()[0], 0, want_norm=True)
        assert norm is not None
        vector = torch.cat([p.detach().flatten() for p in train_state.model.parameters()])
        states.append((vector, float(norm), train_state.meter.read()))
    (one, norm, loss_value), (other, other_norm, other_loss) = states
    assert torch.allclose(one, other, atol=1e-6)
    assert other_norm == pytest.approx(norm, rel=1e-4)
    assert other_loss == pytest.approx(loss_value, rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"precision": "bf16"}, "optim": {"name": "adamw", "lr": 1e-3, "clip_norm": 1.0}},
        {"model": {"backbone": "mobilenet_v3_small"}, "train": {"cutmix": 1.0}},
    ],
)
def test_memory_settings_resume_exactly(change: dict[str, Any], alone: World) -> None:
    memory = {"train": {"accumulate": 2, "checkpoint_activations": True}}
    settings = config(**merge(change, memory))
    whole = build(settings, alone)
    train(whole, 0, 4)
    cut = build(settings, alone)
    train(cut, 0, 2)
    torch.manual_seed(99)
    resumed = build(settings, alone, cut.state())
    train(resumed, 2, 4)
    assert_same(whole, resumed)


@pytest.mark.parametrize("backbone", ["resnet8", "mobilenet_v3_small"])
def test_checkpointing_activations_changes_no_bit_of_a_step(backbone: str, alone: World) -> None:
    states = []
    for checkpointed in (False, True):
        settings = config(model={"backbone": backbone}, train={"checkpoint_activations": checkpointed})
        states.append(build(settings, alone))
        train(states[-1], 0, 2)
    assert_same(*states)
    steps = [value for name, value in states[1].model.state_dict().items() if "num_batches" in name]
    assert {int(value) for value in steps} == {2}


def limited(settings: Config, world: World, images: int, error: type[Exception]) -> TrainState:
    """A training state whose passes fail with more than this number of images."""
    train_state = TrainState(settings, build_model(settings, CLASSES), world, 4)

    def limit(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > images:
            raise error("CUDA out of memory")

    train_state.model.register_forward_pre_hook(limit)
    return train_state


@pytest.mark.parametrize(("images", "count"), [(16, 1), (8, 2), (7, 4), (4, 4)])
def test_the_fewest_micro_batches_that_fit_are_decided(images: int, count: int, alone: World) -> None:
    settings = config(train={"accumulate": "auto"}, model={"freeze_epochs": 1})
    train_state = limited(settings, alone, images, torch.OutOfMemoryError)
    before = copy.deepcopy(train_state.model.state_dict())
    assert fewest_that_fit(settings, alone, train_state.rehearse) == count
    after = train_state.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for p in train_state.model.parameters())
    assert train_state.model.embedder.frozen


def test_a_rehearsal_fails_with_any_other_error(alone: World) -> None:
    settings = config(train={"accumulate": "auto"})
    train_state = limited(settings, alone, 8, RuntimeError)
    with pytest.raises(RuntimeError, match="CUDA"):
        fewest_that_fit(settings, alone, train_state.rehearse)


def test_too_little_memory_for_a_virtual_shard_is_an_error(alone: World) -> None:
    settings = config(train={"accumulate": "auto"})
    train_state = limited(settings, alone, 3, torch.OutOfMemoryError)
    with pytest.raises(UserError, match="4 images does not fit"):
        fewest_that_fit(settings, alone, train_state.rehearse)


def test_auto_is_one_on_a_cpu_and_recorded(alone: World) -> None:
    settings = config(train={"accumulate": "auto"})
    train_state = build(settings, alone)
    assert train_state.accumulate == 1
    state = train_state.state()
    assert build(settings, alone, state).accumulate == 1
    assert build(settings, alone, {**state, "micro_batch": 4}).accumulate == 4
    old = {key: value for key, value in state.items() if key != "micro_batch"}
    assert build(settings, alone, old).accumulate == 1
    assert build(config(train={"accumulate": 2}), alone, state).accumulate == 2


def test_a_recorded_size_applies_to_other_numbers_of_processes() -> None:
    settings = config(train={"batch_size": 64})
    worlds = {size: World(0, size, 0, size, torch.device("cpu"), 1) for size in (1, 2, 4, 8)}
    assert [count_for_size(settings, world, 16) for world in worlds.values()] == [4, 2, 1, 1]
    assert possible_counts(settings, worlds[2]) == [1, 2, 4, 8]
