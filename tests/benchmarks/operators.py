"""ATen operators that augmentation and normalization of a batch dispatch on a GPU, and their CPU time on a CPU.

`PYTHONPATH=TREE python -P tests/benchmarks/operators.py`; fake tensors replace those of a GPU. To compare two versions,
alternate their trees.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.transforms import Transforms, finish

SAMPLES = np.arange(128) * 7919 % 100_000
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "erasing": {"erasing": 0.25},
    "trivial_augment": {"trivial_augment": True},
    "both": {"trivial_augment": True, "erasing": 0.25},
}


class Operators(TorchDispatchMode):
    """Counts the operators of ATen."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten"
        return func(*args, **(kwargs or {}))


def dispatched(options: dict[str, Any]) -> int:
    """Operators of a batch of 128 images of 224 pixels; constants are in place."""
    transforms = Transforms(224, True, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels = torch.empty((128, 224, 224, 3), dtype=torch.uint8, device="cuda")
        finish(transforms, pixels, 0, 1, SAMPLES)
        with Operators() as operators:
            finish(transforms, pixels, 0, 1, SAMPLES)
    return operators.count


def cpu_ms(options: dict[str, Any]) -> float:
    """Least CPU time of 30 batches of 128 images of 32 pixels in one thread."""
    transforms = Transforms(32, True, **options)
    pixels = torch.randint(0, 256, (128, 32, 32, 3), dtype=torch.uint8)

    def timed(work: Callable[[], object]) -> float:
        before = time.thread_time()
        work()
        return time.thread_time() - before

    return min(timed(lambda: finish(transforms, pixels, 0, 1, SAMPLES)) for _ in range(30)) * 1e3


if __name__ == "__main__":
    torch.set_num_threads(1)
    setattr(torch.Tensor, "pin_memory", lambda self, *_: self)  # noqa: B010  # fake tensors have no pinned memory
    for name, options in VARIANTS.items():
        print(json.dumps({name: dispatched(options), "cpu_ms": round(cpu_ms(options), 2)}))
