from __future__ import annotations

import math

import pytest
import torch

from dl2pa.errors import TrainingFailure
from dl2pa.training.distributed import World
from dl2pa.training.meter import TrainMeter


def test_the_mean_is_independent_of_the_order(alone: World) -> None:
    losses = torch.rand(200, generator=torch.Generator().manual_seed(0)) * 10
    means = []
    for order in (torch.arange(200), torch.randperm(200, generator=torch.Generator().manual_seed(1))):
        meter = TrainMeter(alone)
        for step, loss in enumerate(losses[order]):
            meter.add(loss, step)
        means.append(meter.read())
    assert means[0] == means[1]
    assert means[0] == pytest.approx(losses.double().mean().item(), abs=1e-7)


def test_reading_resets_the_mean(alone: World) -> None:
    meter = TrainMeter(alone)
    meter.add(torch.tensor(4.0), 0)
    assert meter.read() == 4.0
    meter.add(torch.tensor(2.0), 1)
    assert meter.read() == 2.0


def test_a_resumed_mean_is_bit_identical(alone: World) -> None:
    losses = torch.rand(20, generator=torch.Generator().manual_seed(0))
    whole, first, second = (TrainMeter(alone) for _ in range(3))
    for step, loss in enumerate(losses):
        whole.add(loss, step)
        (first if step < 7 else second).add(loss, step)
        if step == 6:
            first.gather()
            second.load(first.state())
    assert second.read() == whole.read()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_non_finite_loss_is_reported(alone: World, value: float) -> None:
    meter = TrainMeter(alone)
    for step, loss in ((3, 1.0), (4, value), (5, math.nan), (6, 1.0)):
        meter.add(torch.tensor(loss), step)
    with pytest.raises(TrainingFailure) as caught:
        meter.check("runs/x/checkpoints/step-000000002")
    for part in ("step 4", "rank 0", "runs/x/checkpoints/step-000000002", "resume"):
        assert part in str(caught.value)


def test_finite_losses_pass(alone: World) -> None:
    meter = TrainMeter(alone)
    meter.add(torch.tensor(-3.5), 0)
    meter.check("none")
    assert meter.read() == -3.5


def test_a_huge_finite_loss_stays_huge(alone: World) -> None:
    meter = TrainMeter(alone)
    meter.add(torch.tensor(3e38), 0)
    meter.check("none")
    assert meter.read() > 1e7


def test_half_precision_losses_are_accepted(alone: World) -> None:
    meter = TrainMeter(alone)
    meter.add(torch.tensor(1.5, dtype=torch.bfloat16), 0)
    assert meter.read() == 1.5
