"""fp16: a step whose gradients overflow is skipped, and the next steps are those without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

Make = Callable[..., Any]


def set_scale(state: Any, scale: float) -> None:
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": scale})


def weights_of(state: Any) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in state.model.parameters()])


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_overflow_at_the_first_step_is_skipped(
    name: str, clip_norm: float, make_config: Make, make_state: Make, make_batch: Make
) -> None:
    optim = {"name": name, "lr": 0.1 if name == "sgd" else 1e-3, "clip_norm": clip_norm}
    config = make_config(backbone="resnet8", precision="fp16", batch_size=16, optim=optim)
    disturbed, undisturbed = make_state(config), make_state(config)
    before = weights_of(disturbed)
    batch = make_batch(16)
    set_scale(disturbed, 2.0**60)
    disturbed.step(batch, 0)
    assert torch.equal(weights_of(disturbed), before)
    for state in (disturbed, undisturbed):
        set_scale(state, 2.0**10)
        for number in range(1, 4):
            state.step(batch, number)
    difference = (weights_of(disturbed) - weights_of(undisturbed)).norm()
    assert difference < 0.05 * (weights_of(undisturbed) - before).norm()
    disturbed.check_finite(4, "none")  # raises if the skipped step counts as a failure
