"""A state saved on one device and in one memory format continues on another; commands train and resume."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

Make = Callable[..., Any]


def weights_of(state: Any) -> torch.Tensor:
    return torch.cat([p.detach().float().cpu().flatten() for p in state.model.parameters()])


@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("layout", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("move", ["cpu to gpu", "gpu to cpu", "gpu to gpu"])
def test_a_state_continues_on_the_other_device(
    move: str,
    name: str,
    layout: tuple[bool, bool],
    device: torch.device,
    rehearsing: bool,
    make_config: Make,
    make_state: Make,
    make_batch: Make,
) -> None:
    if rehearsing and move != "gpu to gpu":
        pytest.skip("the same on the CPU")
    first, second = (torch.device("cpu") if d == "cpu" else device for d in move.split(" to "))
    optim = {"name": name, "lr": 0.1 if name == "sgd" else 1e-3, "momentum": 0.9}
    common = {"backbone": "resnet8", "batch_size": 16, "precision": "fp32", "optim": optim}
    old, new = (
        make_state(make_config(**common, channels_last=channels_last), on=on)
        for channels_last, on in zip(layout, (first, second), strict=True)
    )
    for number in range(2):
        old.step(make_batch(16, on=first), number)
    file = io.BytesIO()
    torch.save(old.state(), file)
    file.seek(0)
    new.load(torch.load(file, map_location="cpu", weights_only=True))
    before = weights_of(old)
    assert torch.equal(weights_of(new).sort().values, before.sort().values)
    for state, on in ((old, first), (new, second)):
        for number in range(2, 4):
            state.step(make_batch(16, on=on), number)
    change = weights_of(old) - before
    assert (weights_of(new) - weights_of(old)).norm() < 0.1 * change.norm()


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.precision=fp32"],
        ["train.precision=bf16", "train.mixup=0.2"],
        ["train.precision=fp16", "optim.clip_norm=1"],
    ],
    ids=" ".join,
)
def test_training_runs_and_resumes(overrides: list[str], rehearsing: bool, train_command: list[str]) -> None:
    pytest.importorskip("pydantic")
    if rehearsing and "fp16" not in overrides[0]:
        pytest.skip("the rehearsal takes one precision")
    from support.commands import run_here

    for limit in (5, 10) if rehearsing else (20, 40):
        done = run_here(*train_command, *overrides, f"train.max_steps={limit}")
        assert done.code == 0, done.error
        assert done.result["steps"] == limit
