"""Model, optimizer and the other state of training, and one training step."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dl2pa.assignment import Matching
from dl2pa.backbones import prefers_channels_last, probe_forward
from dl2pa.config import Config
from dl2pa.methods import Targets
from dl2pa.model.model import Model, embedder_buffers
from dl2pa.specs import backbone_spec
from dl2pa.step_parts import part
from dl2pa.training.distributed import World
from dl2pa.training.ema import ModelEma
from dl2pa.training.meter import TrainMeter
from dl2pa.training.optim import build_optimizer, learning_rate, load_optimizer
from pipelines.batch import Batch
from pipelines.mixing import apply_mix, draw_mix
from pipelines.rng import Stream, random_bits

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainState:
    """Model, optimizer, gradient scaler and moving average.

    Args:
        model: the model on the host; it is moved to the world's device.
        steps_per_epoch: steps per epoch of the training pipeline.
    """

    def __init__(self, config: Config, model: Model, world: World, steps_per_epoch: int) -> None:
        self._config = config
        self._world = world
        self._steps_per_epoch = steps_per_epoch
        self._stochastic = _draws_random_numbers(model)
        self._format = memory_format(config, model.embedder.backbone)
        self.model = model.to(world.device)
        self.model.embedder.to(memory_format=self._format)
        if config.train.sync_bn and world.size > 1:
            self.model.embedder = nn.SyncBatchNorm.convert_sync_batchnorm(self.model.embedder)  # pyright: ignore
        gpu = world.device.type == "cuda"
        self._freeze_epochs = config.model.freeze_epochs
        self._backbone_parameters = [p for p in self.model.embedder.backbone.parameters() if p.requires_grad]
        self._set_frozen(isinstance(self._freeze_epochs, str))
        self.optimizer = build_optimizer(self.model, config.optim, fused=gpu)
        self._set_frozen(self._is_frozen_in(0))
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.train.precision == "fp16")
        self.average = ModelEma(self.model, config.train.ema) if config.train.ema else None
        self.meter = TrainMeter(world)
        self._wrapped: nn.Module = self.model

    @property
    def evaluated(self) -> Model:
        """The model for validation and export: the moving average if enabled."""
        return self.average.module if self.average is not None else self.model

    def wrap(self) -> None:
        """Compile the model and wrap it with DDP; call once, after the state was loaded.

        DDP rebuilds its buckets after the first backward pass, and the bucket layout determines the order of sums
        over ranks. A discarded backward pass before the first step makes the layout equal in every attempt.
        """
        if self._config.train.compile:
            self.model.compile(mode=compile_mode(self._config.train.compile))
        self._wrap_with_ddp()

    def _wrap_with_ddp(self) -> None:
        """Wrap the model with DDP, which exchanges the gradients of the parameters that are now trainable."""
        self._wrapped = self.model
        if self._world.size > 1:
            gc.collect()  # the hooks of an earlier DDP end with it
            names = [f"method.{name}" for name in self.model.method.unsynced_buffers()]
            # torch has no public function that excludes single buffers from DDP.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, names)  # pyright: ignore[reportPrivateUsage]
            with warnings.catch_warnings():
                # torch 2.15 deprecates `broadcast_buffers`; earlier versions have no replacement.
                warnings.simplefilter("ignore", FutureWarning)
                self._wrapped = DistributedDataParallel(
                    self.model,
                    device_ids=[self._world.device.index] if self._world.device.type == "cuda" else None,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                )
            self._build_buckets()

    def begin_epoch(self, epoch: int) -> None:
        """Freeze or unfreeze the backbone; notify the method, and its averaged copy, of the epoch that begins.

        A collective where the backbone is unfrozen.
        """
        if self._is_frozen_in(epoch) != self.model.embedder.frozen:
            is_wrapped = self._wrapped is not self.model
            self._set_frozen(self._is_frozen_in(epoch))
            if is_wrapped:
                self._wrap_with_ddp()
        self.model.method.begin_epoch(epoch)
        if self.average is not None:
            self.average.module.method.begin_epoch(epoch)

    def rate(self, global_step: int) -> float:
        """Learning rate of a step."""
        optim, epochs = self._config.optim, self._config.train.epochs
        return learning_rate(optim, global_step, self._steps_per_epoch, epochs)

    def step(self, batch: Batch, global_step: int, want_norm: bool = False) -> Tensor | None:
        """Train on one batch without a host sync; returns the gradient norm (a scalar tensor) if computed."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(global_step) * group["lr_scale"]
        if self._stochastic:
            torch.manual_seed(self._step_seed(global_step))
        with part("dl2pa.mix"):
            images, targets = self._mix(batch, global_step)
        with part("dl2pa.forward"), self._autocast():
            loss, features = self._wrapped(images, *targets)
        with part("dl2pa.backward"):
            self.scaler.scale(loss).backward()
        with part("dl2pa.optimizer"):
            norm = self._clip(want_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        with part("dl2pa.statistic"):
            self.model.method.observe(features.detach(), targets)
        if self.average is not None:
            with part("dl2pa.average"):
                self.average.update(self.model)
        self.meter.add(loss.detach(), global_step)
        return norm

    def score(self, images: Tensor) -> Tensor:
        """Logits [B, C] of the evaluated model; the caller sets evaluation mode."""
        with self._autocast():
            return self.evaluated.score(images.contiguous(memory_format=self._format))

    def rematch(self) -> Matching | None:
        """Update the assignment of labels to prototypes; a collective."""
        result = self.model.method.rematch()
        if self.average is not None:
            self.average.copy_buffers(self.model)
        return result

    def sync_buffers(self) -> None:
        """Broadcast rank 0's BatchNorm statistics, before validation and saving; a collective."""
        if self._world.size > 1:
            for buffer in embedder_buffers(self.model):
                dist.broadcast(buffer, src=0)
        if self.average is not None:
            self.average.copy_buffers(self.model)

    def check_finite(self, step: int, last_good: str) -> None:
        """Check that loss and weights are finite, before validation and saving; a collective.

        Raises:
            TrainingFailure: names the step, the rank and the last good checkpoint.
        """
        norm = nn.utils.get_total_norm([p.detach() for p in self.model.parameters()])
        self.meter.add_bad(~torch.isfinite(norm), step)
        self.meter.check(last_good)

    def state(self) -> dict[str, Any]:
        """State dict on rank 0, independent of the world size; empty on other ranks; a collective."""
        self.sync_buffers()
        self.model.method.gather_state()
        self.meter.gather()
        if not self._world.is_main:
            return {}
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "meter": self.meter.state(),
        }

    def release_gathered(self) -> None:
        """Keep the gathered sums on rank 0 only; call after the state was copied."""
        self.model.method.keep_on_rank_zero()
        self.meter.keep_on_rank_zero()

    def load(self, state: dict[str, Any]) -> None:
        """Restore a state dict; hyperparameters are taken from the configuration."""
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"], self._config.optim)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.model.method.refresh()
        if self.average is not None:
            self.average.load(state["average"], self.model)
        self.meter.load(state["meter"])
        self.release_gathered()

    def _is_frozen_in(self, epoch: int) -> bool:
        return isinstance(self._freeze_epochs, str) or epoch < self._freeze_epochs

    def _set_frozen(self, frozen: bool) -> None:
        self.model.embedder.frozen = frozen
        for parameter in self._backbone_parameters:
            parameter.requires_grad_(not frozen)
        self.model.embedder.train(self.model.embedder.training)

    def _mix(self, batch: Batch, global_step: int) -> tuple[Tensor, Targets]:
        train = self._config.train
        images = batch.images.contiguous(memory_format=self._format)
        local = len(batch.targets)
        start = self._world.rank * local
        draw = draw_mix(
            train.seed,
            global_step,
            start + np.arange(local, dtype=np.int64),
            train.batch_size // self._config.virtual_shards,
            train.mixup,
            train.cutmix,
            *(images.shape[2:] or (1, 1)),  # mixup of feature vectors needs no size
        )
        if draw is None:
            return images, Targets(batch.targets)
        mixed = apply_mix(images, batch.targets, draw)
        return mixed.images, Targets(mixed.targets_a, mixed.targets_b, mixed.lam)

    def _clip(self, want_norm: bool) -> Tensor | None:
        limit = self._config.optim.clip_norm
        if not (limit or want_norm):
            return None
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if limit:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)
        return norm

    def _autocast(self) -> torch.autocast:
        return autocast(self._config.train.precision, self._world.device)

    def _step_seed(self, global_step: int) -> int:
        key = random_bits(self._config.train.seed, Stream.STEP_SEED, global_step, self._world.rank)
        return int(key) >> 1

    def _build_buckets(self) -> None:
        """Run a forward and backward pass on noise and discard the gradients and buffer updates."""
        # Methods change their buffers in `observe` only.
        saved = [(b, b.clone()) for b in self.model.embedder.buffers()]
        local = self._config.train.batch_size // self._world.size
        torch.manual_seed(self._config.train.seed)
        images = torch.randn(local, *self.model.embedder.input_shape, device=self._world.device)
        labels = torch.arange(local, device=self._world.device) % self.model.method.num_classes
        mixes = self._config.train.mixup or self._config.train.cutmix
        second = (labels, torch.full((local,), 0.5, device=self._world.device)) if mixes else (None, None)
        self._wrapped.train()
        with self._autocast():
            loss, _ = self._wrapped(images.contiguous(memory_format=self._format), labels, *second)
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def memory_format(config: Config, backbone: nn.Module) -> torch.memory_format:
    """Memory format of the backbone and its images; feature vectors have none."""
    spec, channels_last = backbone_spec(config.model.backbone), config.train.channels_last
    if channels_last is None:
        channels_last = spec.channels_last
    if channels_last is None:
        channels_last = prefers_channels_last(backbone)
    return torch.channels_last if channels_last and not spec.takes_features else torch.contiguous_format


def compile_mode(choice: bool | str) -> str | None:
    """torch.compile mode for `train.compile`; `graphs` replays the kernels of a pass as one CUDA graph."""
    return "reduce-overhead" if choice == "graphs" else None


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Autocast context for `train.precision`; disabled for fp32."""
    dtype = _DTYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def _draws_random_numbers(model: Model) -> bool:
    """Whether a training step draws from torch's generator; if in doubt true, because seeding a step is harmless."""
    try:
        return probe_forward(model.embedder, model.embedder.input_shape).draws_random_numbers
    except Exception:
        return True
