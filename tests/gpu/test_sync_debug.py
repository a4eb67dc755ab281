"""A training step makes the host wait for nothing; CUDA itself watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic")

from pipelines.build import build_pipeline
from pipelines.datasets.arrays import ArrayDataset
from pipelines.sampler import TrainSampler
from pipelines.transforms import Transforms

Make = Callable[..., Any]
METHODS: list[dict[str, Any]] = [
    {},
    {"name": "psc", "margin": 0.2},
    {"name": "ebv", "learn_scale": True, "margin": 0.2, "prototypes": "max_cosine"},
    {"name": "etf"},
    {"name": "kasarla", "prototypes": "max_cosine"},
    {"name": "dnc"},
    {"name": "goto"},
]


def resident(device: torch.device, batch_size: int, side: int = 32) -> Any:
    generator = np.random.default_rng(0)
    count = 10 * batch_size
    images = generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    dataset = ArrayDataset(images, generator.integers(0, 10, count), tuple("0123456789"), "test")
    jitter = (0.4, 0.4, 0.4, 0.1)
    recipe = Transforms(
        side, train=True, crop="pad", trivial_augment=True, rand_augment=2, color_jitter=jitter, erasing=0.5
    )
    order = TrainSampler(count, batch_size, 0)
    return build_pipeline(dataset, recipe, order, loader="resident", seed=0, device=device, threads=1)


def train(state: Any, pipeline: Any, forbid_host_sync: Callable[[], None], want_norm: bool = False) -> None:
    pipeline.start(0)
    for number, batch in enumerate(pipeline):
        if number == 3:  # allocations and constants are in place
            forbid_host_sync()
        state.step(batch, number, want_norm)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.get("name", "dl2pa")))
def test_a_step_has_no_host_sync(
    precision: str,
    method: dict[str, Any],
    device: torch.device,
    rehearsing: bool,
    make_config: Make,
    make_state: Make,
    forbid_host_sync: Callable[[], None],
) -> None:
    if rehearsing and precision != "bf16" and method:
        pytest.skip("the rehearsal takes one method per precision")
    size = 8 if rehearsing else 64
    backbone = "resnet8" if rehearsing else "resnet20"
    config = make_config(method, backbone=backbone, precision=precision, batch_size=size)
    state = make_state(config)
    train(state, resident(device, size), forbid_host_sync)


def test_swin_with_clipping_has_no_host_sync(
    device: torch.device,
    rehearsing: bool,
    make_config: Make,
    make_state: Make,
    forbid_host_sync: Callable[[], None],
) -> None:
    size, side = (2, 32) if rehearsing else (16, 224)
    optim = {"name": "adamw", "lr": 1e-3, "clip_norm": 5.0}
    config = make_config(backbone="swin_t", image_size=side, precision="bf16", batch_size=size, optim=optim)
    train(make_state(config), resident(device, size, side), forbid_host_sync, want_norm=True)


def test_the_watch_sees_a_host_sync(
    device: torch.device, rehearsing: bool, forbid_host_sync: Callable[[], None]
) -> None:
    if rehearsing:
        pytest.skip("CUDA watches")
    value = torch.ones(1, device=device)
    forbid_host_sync()
    with pytest.raises(RuntimeError, match="synchronizing"):
        value.item()
