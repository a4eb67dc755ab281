"""No step reads a value off the device: on a GPU each such reading would make the processor wait for it.

`tests/gpu` has CUDA itself watch. Here every way in which a tensor's value reaches Python is counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dl2pa.config import parse_config
from dl2pa.model.model import build_model
from dl2pa.training.distributed import World
from dl2pa.training.train_state import TrainState
from pipelines.batch import Batch

WORLD = World(0, 1, 0, 1, torch.device("cpu"), 1)
READINGS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")
OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
"""Whose results have a size or a value that the host must know."""


class Readings(TorchDispatchMode):
    """Counts values that leave tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        for name in READINGS:
            monkeypatch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))

    def _counted(self, name: str, method: Any) -> Any:
        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen[name] += 1
            return method(tensor, *args, **kwargs)

        return read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name.startswith(OPERATORS) or masked:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def test_the_counter_counts_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, Readings(patch) as readings:
        values = torch.arange(3.0)
        if values.sum() > 1:
            values[values > 1].sum().item()
    assert readings.seen["__bool__"] and readings.seen["item"] and readings.seen["index"]


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"name": "dl2pa", "loss": "cross_entropy", "match": {"warmup_epochs": 1}},
        {"name": "psc", "margin": 0.2, "logit_adjustment": 1.0},
        {"name": "ebv", "learn_scale": True, "margin": 0.2, "prototypes": "max_cosine"},
        {"name": "etf", "assignment": "dynamic"},
        {"name": "kasarla", "prototypes": "max_cosine"},
        {"name": "dnc"},
        {"name": "goto"},
    ],
    ids=lambda method: " ".join(map(str, method.values())) or "dl2pa",
)
def test_a_step_reads_no_value_from_the_device(
    method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(
        {
            "method": method,
            "data": {"dataset": "cifar10", "image_size": 32, "crop": "pad"},
            "model": {"backbone": "resnet8", "embedding_dim": 5},
            "train": {"batch_size": 16, "mixup": 0.2, "cutmix": 1.0, "ema": 0.9, "precision": "bf16"},
            "optim": {"lr": 0.1, "clip_norm": 1.0},
        }
    )
    model = build_model(config, 10)
    model.method.set_class_counts(torch.arange(10))
    train_state = TrainState(config, model, WORLD, 10)
    train_state.begin_epoch(0)
    train_state.model.train()
    labels = torch.arange(16) % 10
    batch = Batch(torch.randn(16, 3, 32, 32), labels, torch.arange(16), 16)
    train_state.step(batch, 0)  # constants and the optimizer's state are in place
    with monkeypatch.context() as patch, Readings(patch) as readings:
        for number in range(1, 4):
            train_state.step(batch, number, want_norm=True)
    assert readings.seen == {}
    assert train_state.meter.read() > 0
