"""No step reads a value off the device: on a GPU each such reading would make the processor wait for it.

`tests/gpu` has CUDA itself watch. Here every way in which a tensor's value reaches Python is counted, and a step is run
on fake CUDA tensors, which have a device and no values.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dl2pa.config import parse_config
from dl2pa.model.model import build_model
from dl2pa.training.distributed import World
from dl2pa.training.train_state import TrainState
from pipelines.batch import Batch
from pipelines.rand_augment import draw_rand
from pipelines.transforms import Transforms, finish

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


METHODS: list[dict[str, Any]] = [
    {},
    {"name": "dl2pa", "loss": "cross_entropy", "match": {"warmup_epochs": 1}},
    {"name": "psc", "margin": 0.2, "logit_adjustment": 1.0},
    {"name": "ebv", "learn_scale": True, "margin": 0.2, "prototypes": "max_cosine"},
    {"name": "etf", "assignment": "dynamic"},
    {"name": "kasarla", "prototypes": "max_cosine"},
    {"name": "dnc"},
    {"name": "goto"},
]


def name_of(method: dict[str, Any]) -> str:
    return " ".join(map(str, method.values())) or "dl2pa"


@pytest.mark.parametrize("method", METHODS, ids=name_of)
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


CUDA = torch.device("cuda", 0)


class Transfers(TorchDispatchMode):
    """Counts operations between host and device that make the host wait, or that mix tensors of both."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # The fused SGD works in place and has no implementation for fake tensors.
        result = None if name == "_fused_sgd_" else func(*args, **(kwargs or {}))
        sources = devices((args, kwargs))
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            non_blocking = (kwargs or {}).get("non_blocking", args[2:3] == (True,))
            if source.device != result.device and (source.device == CUDA or not non_blocking):
                self.seen[f"{name} from {source.device.type}"] += 1
        elif len(sources) > 1:
            self.seen[f"{name} of tensors on host and device"] += 1
        return result


def devices(tree: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def set_gradients(module: nn.Module) -> Any:
    """A replacement of `Tensor.backward`: autograd's engine needs CUDA even for fake tensors."""

    def backward(loss: Tensor) -> None:
        assert loss.device == CUDA
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    return backward


def move_to_fake_cuda(module: nn.Module) -> None:
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            part.register_parameter(
                name, nn.Parameter(torch.empty_like(value, device=CUDA), value.requires_grad)
            )
        for name, value in part.named_buffers(recurse=False):
            persistent = name not in part._non_persistent_buffers_set
            part.register_buffer(name, torch.empty_like(value, device=CUDA), persistent)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Let torch believe in a GPU with fake tensors."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self, *_: self)
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize(
    ("reads", "name"),
    [
        (lambda host, device: device.cpu(), "_to_copy from cuda"),
        (lambda host, device: host.to(CUDA), "_to_copy from cpu"),
        (lambda host, device: device * host.sum(), "mul of tensors on host and device"),
        (lambda host, device: device.copy_(host), "copy_ from cpu"),
        (lambda host, device: host.to(CUDA, non_blocking=True), None),
    ],
)
def test_transfers_are_counted(reads: Any, name: str | None, fake_cuda: FakeTensorMode) -> None:
    with fake_cuda, Transfers() as transfers:
        reads(torch.ones(3), torch.ones(3, device=CUDA))
    assert transfers.seen == ({name: 1} if name else {})
    with fake_cuda, pytest.raises(DataDependentOutputException):
        torch.ones(3, device=CUDA).sum().item()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.filterwarnings("ignore")
def test_a_step_on_fake_cuda_waits_for_nothing(
    method: dict[str, Any], precision: str, fake_cuda: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "adamw" if precision == "fp32" else "sgd"
    config = parse_config(
        {
            "method": method,
            "data": {"dataset": "cifar10", "image_size": 32, "crop": "pad"},
            "model": {"backbone": "resnet8", "embedding_dim": 5},
            "train": {
                **{"batch_size": 16, "mixup": 0.2, "cutmix": 1.0, "ema": 0.9, "precision": precision},
                "accumulate": 2 if precision == "fp16" else 1,
            },
            "optim": {"name": name, "lr": 0.1, "clip_norm": 1.0},
        }
    )
    model = build_model(config, 10)
    model.method.set_class_counts(torch.arange(10))
    with fake_cuda, Transfers() as transfers:
        move_to_fake_cuda(model)
        train_state = TrainState(config, model, World(0, 1, 0, 1, CUDA, 1), 10)
        monkeypatch.setattr(Tensor, "backward", set_gradients(model))
        train_state.begin_epoch(0)
        train_state.model.train()
        labels = torch.zeros(16, dtype=torch.int64, device=CUDA)
        batch = Batch(torch.empty(16, 3, 32, 32, device=CUDA), labels, labels, 16)
        train_state.step(batch, 0)  # constants and the optimizer's state are in place
        transfers.seen.clear()
        for number in range(1, 5):  # with mixup and with CutMix
            train_state.step(batch, number, want_norm=True)
    assert transfers.seen == {}


class Operators(TorchDispatchMode):
    """Counts operators of ATen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_augmentation_dispatches_few_operators(fake_cuda: FakeTensorMode) -> None:
    """The step loop dispatches each of them in one Python thread."""
    transforms = Transforms(image_size=64, train=True, trivial_augment=True, erasing=0.9)
    samples = np.arange(128)
    with fake_cuda, Operators() as operators:
        pixels = torch.empty(128, 64, 64, 3, dtype=torch.uint8, device=CUDA)
        finish(transforms, pixels, 0, 0, samples)  # constants are in place
        operators.seen.clear()
        finish(transforms, pixels, 0, 1, samples)
    assert operators.seen.total() < 190, operators.seen


@pytest.mark.parametrize("augmented", [False, True], ids=["plain", "augmented"])
def test_augmentation_on_fake_cuda_waits_for_nothing(augmented: bool, fake_cuda: FakeTensorMode) -> None:
    transforms = Transforms(
        image_size=32,
        train=True,
        crop="pad",
        trivial_augment=augmented,
        rand_augment=2 * augmented,
        color_jitter=(0.4 * augmented, 0.4 * augmented, 0.4 * augmented, 0.1 * augmented),
        erasing=0.9 * augmented,
    )
    samples = np.arange(128)
    draw_rand(0, 0, samples, 1, 9, (32, 32))  # its table of magnitudes is on the host
    with fake_cuda, Transfers() as transfers:
        pixels = torch.empty(128, 32, 32, 3, dtype=torch.uint8, device=CUDA)
        finish(transforms, pixels, 0, 0, samples)  # constants are in place
        transfers.seen.clear()
        images = finish(transforms, pixels, 0, 1, samples)
        assert images.shape == (128, 3, 32, 32) and images.device == CUDA
    assert transfers.seen == {}
