from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dl2pa.config.schema import OptimConfig
from dl2pa.training.optim import build_optimizer, learning_rate, load_optimizer

STEPS = 10


def config(**values: Any) -> OptimConfig:
    return OptimConfig.model_validate(values)


def test_warm_up_is_linear_and_ends_at_the_rate() -> None:
    optim = config(lr=2.0, warmup_epochs=2, warmup_start=0.1, schedule="constant")
    rates = [learning_rate(optim, step, STEPS, 9) for step in range(25)]
    assert rates[0] == pytest.approx(0.2)
    rises = [b - a for a, b in itertools.pairwise(rates[:21])]
    assert rises == pytest.approx([1.8 / 20] * 20)
    assert rates[20:] == [2.0] * 5


@pytest.mark.parametrize("warmup", [0, 3])
def test_cosine_falls_from_the_rate_to_its_minimum(warmup: int) -> None:
    optim = config(lr=1.0, schedule="cosine", warmup_epochs=warmup, min_lr=0.1)
    first, last = warmup * STEPS, 9 * STEPS
    assert learning_rate(optim, first, STEPS, 9) == pytest.approx(1.0)
    assert learning_rate(optim, (first + last) // 2, STEPS, 9) == pytest.approx(0.55)
    for step in range(first, last):
        expected = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - first) / (last - first)))
        assert learning_rate(optim, step, STEPS, 9) == pytest.approx(expected)
    assert learning_rate(optim, last, STEPS, 9) == pytest.approx(0.1)
    assert learning_rate(optim, last + 50, STEPS, 9) == pytest.approx(0.1)


def test_step_schedule_falls_right_after_each_milestone() -> None:
    optim = config(lr=1.0, schedule="step", milestones=[2, 5], gamma=0.1)
    rates = [learning_rate(optim, step, STEPS, 9) for step in range(9 * STEPS)]
    assert rates[:20] == [1.0] * 20
    assert rates[20:50] == pytest.approx([0.1] * 30)
    assert rates[50:] == pytest.approx([0.01] * 40)


def test_the_order_of_the_milestones_does_not_matter() -> None:
    rates = [
        [learning_rate(config(schedule="step", milestones=order), step, STEPS, 9) for step in range(90)]
        for order in ([2, 5, 7], [7, 2, 5])
    ]
    assert rates[0] == rates[1]


def test_the_schedule_of_the_long_tailed_recipe() -> None:
    """Warm-up 5, then x0.1 after 160 and x0.01 after 180 of 200 epochs."""
    optim = config(lr=0.1, schedule="step", milestones=[160, 180], warmup_epochs=5)
    at = {epoch: learning_rate(optim, epoch * STEPS, STEPS, 200) for epoch in (0, 5, 159, 160, 180, 199)}
    expected = {0: 0.001, 5: 0.1, 159: 0.1, 160: 0.01, 180: 0.001, 199: 0.001}
    assert at == {epoch: pytest.approx(rate) for epoch, rate in expected.items()}


def test_a_warm_up_of_half_an_epoch() -> None:
    optim = config(lr=1.0, warmup_epochs=0.5, warmup_start=0.0, schedule="constant")
    assert [learning_rate(optim, s, STEPS, 1) for s in range(6)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)


def step_with_zero_gradients(optim: OptimConfig) -> dict[str, bool]:
    """Names of the parameters that weight decay changes."""
    torch.manual_seed(0)
    net = Net()
    nn.init.ones_(net.norm.bias)
    before = {k: p.detach().clone() for k, p in net.named_parameters()}
    optimizer = build_optimizer(net, optim, fused=False)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {k: not torch.equal(p, before[k]) for k, p in net.named_parameters()}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_excludes_norms_and_biases(name: str) -> None:
    moved = step_with_zero_gradients(config(name=name, lr=0.1, weight_decay=0.1))
    assert {k for k, m in moved.items() if m} == {"conv.weight", "head.weight"}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_all_includes_every_trainable_parameter(name: str) -> None:
    moved = step_with_zero_gradients(config(name=name, lr=0.1, weight_decay=0.1, decay_all=True))
    assert {k for k, m in moved.items() if not m} == {"frozen"}


@pytest.mark.parametrize(
    "optim",
    [
        config(lr=0.1, momentum=0.8, nesterov=True, weight_decay=1e-3),
        config(lr=0.1, momentum=0.0, nesterov=True),
        config(name="adamw", lr=1e-3, betas=[0.8, 0.99], weight_decay=0.05),
    ],
    ids=["nesterov", "plain", "adamw"],
)
def test_steps_equal_those_of_torchs_optimizer(optim: OptimConfig) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    theirs.load_state_dict(ours.state_dict())
    reference: torch.optim.Optimizer
    if optim.name == "sgd":
        nesterov = optim.nesterov and optim.momentum > 0
        reference = torch.optim.SGD(
            theirs.parameters(), 0.1, optim.momentum, weight_decay=optim.weight_decay, nesterov=nesterov
        )
    else:
        reference = torch.optim.AdamW(theirs.parameters(), 1e-3, optim.betas, weight_decay=0.05)
    x = torch.randn(5, 4)
    for module, optimizer in ((ours, build_optimizer(ours, optim, fused=False)), (theirs, reference)):
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)


def test_hyperparameters_after_a_load_are_the_configured() -> None:
    old = build_optimizer(Net(), config(momentum=0.9, weight_decay=1e-4), fused=False)
    changed = config(momentum=0.5, weight_decay=5e-4)
    optimizer = build_optimizer(Net(), changed, fused=False)
    load_optimizer(optimizer, old.state_dict(), changed)
    assert [(g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 5e-4), (0.5, 0.0)]


@pytest.fixture
def uninitialized_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def steps_with_scaler(gradients: list[float], optim: OptimConfig, *, fused: bool) -> Tensor:
    """Weights after steps with these gradients under fp16's gradient scaler."""
    module = nn.Linear(4, 3, bias=False)
    nn.init.ones_(module.weight)
    optimizer = build_optimizer(module, optim, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for gradient in gradients:
        scaler.scale((module.weight * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return module.weight.detach()


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_overflow_at_the_first_step_is_skipped(name: str) -> None:
    optim = config(name=name, lr=0.1, momentum=0.9, nesterov=True)
    skipped = steps_with_scaler([math.inf, 1.0, 2.0], optim, fused=True)
    assert torch.equal(skipped, steps_with_scaler([1.0, 2.0], optim, fused=True))
    assert torch.allclose(skipped, steps_with_scaler([1.0, 2.0], optim, fused=False))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(("saved", "loaded"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_a_state_moves_between_cpu_and_gpu(name: str, saved: str, loaded: str) -> None:
    """Fake tensors replace those of a GPU. The saved state is in host memory, as a checkpoint is read."""
    optim = config(name=name, lr=0.1, momentum=0.9)
    module = nn.Linear(4, 3, bias=False)
    optimizer = build_optimizer(module, optim, fused=False)
    module.weight.grad = torch.ones_like(module.weight)
    optimizer.step()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["fused"] = saved == "cuda" or None
    with FakeTensorMode(allow_non_fake_inputs=True):
        resumed = build_optimizer(nn.Linear(4, 3, bias=False, device=loaded), optim, fused=loaded == "cuda")
        load_optimizer(resumed, state, optim)
        (entries,) = resumed.state.values()
        assert entries.keys() == {"momentum_buffer"} if name == "sgd" else {"step", "exp_avg", "exp_avg_sq"}
        assert {value.device.type for value in entries.values()} == {loaded}
    assert [group["fused"] for group in resumed.param_groups] == [loaded == "cuda" or None] * 2


def test_a_state_takes_the_memory_format_of_the_parameters() -> None:
    saved, loaded = Net(), Net()
    loaded.to(memory_format=torch.channels_last)
    optim = config(lr=0.1, momentum=0.9)
    old, new = build_optimizer(saved, optim, fused=False), build_optimizer(loaded, optim, fused=False)
    for parameter in saved.parameters():
        parameter.grad = torch.randn_like(parameter)
    old.step()
    load_optimizer(new, old.state_dict(), optim)
    before, after = old.state[saved.conv.weight], new.state[loaded.conv.weight]
    assert torch.equal(before["momentum_buffer"], after["momentum_buffer"])
    assert after["momentum_buffer"].stride() == loaded.conv.weight.stride() != saved.conv.weight.stride()
