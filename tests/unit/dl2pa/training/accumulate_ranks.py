"""Run by test_accumulate.py: the same run as 1 process with 4 micro-batches, 2 with 2, and 4 with 1."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
import torch._dynamo  # the optimizers import it; here once, before the forks
from torch import Tensor, nn
from torch import distributed as dist

from dl2pa.config import Config, parse_config
from dl2pa.model.model import build_model
from dl2pa.training.accumulate import fewest_that_fit
from dl2pa.training.distributed import World
from dl2pa.training.train_state import TrainState
from pipelines.sampler import TrainSampler
from pipelines.synthetic import SyntheticPipeline
from support.process_groups import fork_groups

CLASSES, BATCH, STEPS, PARTS = 6, 32, 4, 4
CPU = torch.device("cpu")
METHODS: dict[str, dict[str, Any]] = {
    "squared cosine": {"name": "dl2pa", "assignment": "dynamic", "match": {"every_steps": 2}},
    "dot regression": {"name": "etf", "loss": "dot_regression"},
}


def configure(method: dict[str, Any], accumulate: int | str, **train: Any) -> Config:
    train = {"batch_size": BATCH, "accumulate": accumulate, "mixup": 0.4, "cutmix": 1.0, "ema": 0.5, **train}
    return parse_config(
        {
            "data": {"dataset": "synthetic", "num_classes": CLASSES, "image_size": 8},
            "model": {"backbone": "resnet8", "embedding_dim": 5, "widths": [4, 4, 4]},
            "method": method,
            "train": train,
            "optim": {"lr": 0.1, "schedule": "constant", "clip_norm": 1.0},
        }
    )


def without_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(2, child.num_features))
        without_batch_norm(child)


def digest(*tensors: Tensor | None) -> str:
    data = b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors if t is not None)
    return hashlib.sha256(data).hexdigest()[:16]


class Run:
    """Training state of one process, which notes the inputs of every forward pass."""

    def __init__(
        self, config: Config, world: World, *, norm: bool, state: dict[str, Any] | None = None
    ) -> None:
        torch.manual_seed(0)
        model = build_model(config, CLASSES)
        if not norm:
            without_batch_norm(model.embedder)
        model.embedder.head = nn.Sequential(nn.Dropout(0.2), model.embedder.head)
        self.train_state = TrainState(config, model, world, STEPS)
        if state is not None:
            self.train_state.load(copy.deepcopy(state))
        self.train_state.wrap()
        self.train_state.release_gathered()
        sampler = TrainSampler(STEPS * BATCH, BATCH, 0, world.rank, world.size)
        self.pipeline = SyntheticPipeline(CLASSES, 8, sampler, 0, CPU)
        self.inputs: list[str] = []
        self.losses: list[float] = []
        self.sums: list[str] = []
        model.register_forward_pre_hook(lambda _module, args: self.inputs.append(digest(*args[:4])))

    def train(self, first: int, last: int) -> None:
        train_state, method = self.train_state, self.train_state.model.method
        train_state.begin_epoch(0)
        train_state.model.train()
        self.pipeline.start(0, first)
        for step, batch in zip(range(first, last), self.pipeline, strict=False):
            train_state.step(batch, step)
            self.losses.append(train_state.meter.read())
            if getattr(method, "statistic", None) is not None:
                self.sums.append(self._sums())
            if method.due_after_step(0, step + 1):
                train_state.rematch()

    def _sums(self) -> str:
        """Digest of the class statistic of all processes; the statistic itself stays separate."""
        statistic: Any = self.train_state.model.method.statistic
        total = [statistic.sums.clone(), statistic.counts.clone()]
        if dist.is_initialized():
            for tensor in total:
                dist.all_reduce(tensor)
        return digest(*total)

    def weights(self) -> str:
        self.train_state.sync_buffers()  # BatchNorm statistics are per process until a save
        assert self.train_state.average is not None
        state = self.train_state.model.state_dict()
        kept = [value for name, value in state.items() if "statistic" not in name]
        return digest(*kept, *self.train_state.average.module.parameters())

    def state(self) -> dict[str, Any]:
        saved = [copy.deepcopy(self.train_state.state())]
        self.train_state.release_gathered()
        if dist.is_initialized():
            dist.broadcast_object_list(saved, src=0)
        return saved[0]


def differences(world: World) -> list[str]:
    """What changes bits of a run with BatchNorm: resuming it, or computing its activations again."""
    method, count = METHODS["squared cosine"], PARTS // world.size
    config = configure(method, count, checkpoint_activations=True)
    plain = Run(configure(method, count), world, norm=True)
    plain.train(0, STEPS)
    whole = Run(config, world, norm=True)
    whole.train(0, STEPS)
    cut = Run(config, world, norm=True)
    cut.train(0, 2)
    resumed = Run(config, world, norm=True, state=cut.state())
    resumed.train(2, STEPS)
    runs = {"resumed": resumed, "checkpointed": plain}
    return [name for name, run in runs.items() if run.weights() != whole.weights()]


def decided(world: World) -> int:
    """Number of micro-batches decided if the last process has memory for 4 images only."""
    config = configure(METHODS["dot regression"], "auto")
    train_state = TrainState(config, build_model(config, CLASSES), world, STEPS)

    def limit(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if world.rank == world.size - 1 and len(args[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    train_state.model.register_forward_pre_hook(limit)
    return fewest_that_fit(config, world, train_state.rehearse)


def report(world: World) -> dict[str, Any]:
    result: dict[str, Any] = {"runs": {}}
    if world.size == 2:
        result |= {"differences": differences(world), "decided": decided(world)}
    for name, method in METHODS.items():
        run = Run(configure(method, PARTS // world.size), world, norm=False)
        run.train(0, STEPS)
        result["runs"][name] = {"inputs": run.inputs, "losses": run.losses, "sums": run.sums}
    return result


if __name__ == "__main__":
    fork_groups(report, (1, 2, 4))
