"""Model, optimizer and the other state of training, and one training step."""

from __future__ import annotations

import gc
import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dl2pa.assignment import Matching
from dl2pa.backbones import checkpoint_activations, prefers_channels_last, probe_forward, synchronize_norms
from dl2pa.config import Config
from dl2pa.methods import Targets
from dl2pa.model.model import Model, embedder_buffers
from dl2pa.specs import backbone_spec
from dl2pa.step_parts import part
from dl2pa.training.accumulate import count_for_size, fewest_that_fit
from dl2pa.training.distributed import World
from dl2pa.training.ema import ModelEma
from dl2pa.training.meter import TrainMeter
from dl2pa.training.negatives import with_negatives
from dl2pa.training.optim import build_optimizer, learning_rate, load_optimizer
from dl2pa.training.rehearsal import discarded, later_memory, noise_images, noise_targets
from pipelines.batch import Batch
from pipelines.mixing import apply_mix, draw_mix
from pipelines.rng import Stream, random_bits

log = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainState:
    """Model, optimizer, gradient scaler and moving average.

    Args:
        model: the model on the host; it is moved to the world's device.
        steps_per_epoch: steps per epoch of the training pipeline.

    Attributes:
        accumulate: micro-batches per step and process; `train.accumulate=auto` is decided by ``wrap``.
    """

    def __init__(self, config: Config, model: Model, world: World, steps_per_epoch: int) -> None:
        self._config = config
        self._world = world
        self._steps_per_epoch = steps_per_epoch
        self._stochastic = _draws_random_numbers(model)
        if config.train.checkpoint_activations:
            checkpoint_activations(model.embedder.backbone, config.model.backbone, config.data.image_size)
        self._format = memory_format(config, model.embedder.backbone)
        self.model = model.to(world.device)
        self.model.embedder.to(memory_format=self._format)
        if config.train.sync_bn and world.size > 1:
            synchronize_norms(self.model.embedder, config.model.backbone)
        self.model.embedder.freeze_norm = config.model.freeze_norm
        gpu = world.device.type == "cuda"
        self._freeze_epochs = config.model.freeze_epochs
        self._backbone_parameters = [p for p in self.model.embedder.backbone.parameters() if p.requires_grad]
        self._set_frozen(isinstance(self._freeze_epochs, str))
        self._optim = config.scaled_optim
        self.optimizer = build_optimizer(self.model, self._optim, fused=gpu)
        self._set_frozen(self._is_frozen_in(0))
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.train.precision == "fp16")
        self.average = ModelEma(self.model, config.train.ema) if config.train.ema else None
        self.meter = TrainMeter(world)
        self.accumulate = 1 if config.train.accumulate == "auto" else config.train.accumulate
        self._recorded_size: int | None = None
        self._wrapped: nn.Module = self.model

    @property
    def evaluated(self) -> Model:
        """The model for validation and export: the moving average if enabled."""
        return self.average.module if self.average is not None else self.model

    def wrap(self) -> None:
        """Decide `train.accumulate=auto`, compile the model, wrap it with DDP; call once, after the state was loaded.

        DDP rebuilds its buckets after the first backward pass, and the bucket layout determines the order of sums
        over ranks. A discarded backward pass before the first step makes the layout equal in every attempt.
        """
        if self._config.train.accumulate == "auto":
            self._decide_accumulate()
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
        return learning_rate(self._optim, global_step, self._steps_per_epoch, self._config.train.epochs)

    def step(self, batch: Batch, global_step: int, want_norm: bool = False) -> Tensor | None:
        """Train on one batch without a host sync; returns the gradient norm (a scalar tensor) if computed."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(global_step) * group["lr_scale"]
        with part("dl2pa.mix"):
            images, targets = self._mix(batch, global_step)
            first = self._world.rank * len(targets.first)
            targets = with_negatives(self.model.method, targets, self._config.train.seed, global_step, first)
        loss, observed = self._compute_gradients(images, targets, global_step)
        with part("dl2pa.optimizer"):
            norm = self._clip(want_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        with part("dl2pa.statistic"):
            self.model.method.observe(observed[0], targets, *observed[1:])
        if self.average is not None:
            with part("dl2pa.average"):
                self.average.update(self.model)
        self.meter.add(loss, global_step)
        return norm

    def _compute_gradients(
        self, images: Tensor, targets: Targets, global_step: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Add up the gradients of all micro-batches; returns the mean loss and what `Method.observe` gets.

        Processes exchange the gradients in the backward pass of the last micro-batch.
        """
        count = self.accumulate
        if count > 1:
            targets = self.model.method.count_batch(targets)
        losses: list[Tensor] = []
        observed: list[list[Tensor]] = []
        for number, (images_part, targets_part) in enumerate(_micro_batches(images, targets, count)):
            if self._stochastic:
                torch.manual_seed(self._step_seed(global_step, number))
            with nullcontext() if number == count - 1 else self._no_sync():
                with part("dl2pa.forward"), self._autocast():
                    loss, *outputs = self._wrapped(images_part, *targets_part)
                with part("dl2pa.backward"):
                    self.scaler.scale(loss if count == 1 else loss / count).backward()
            losses.append(loss.detach())
            observed.append([output.detach() for output in outputs])
        if count == 1:
            return losses[0], observed[0]
        return torch.stack(losses).mean(), [torch.cat(parts) for parts in zip(*observed, strict=True)]

    def _no_sync(self) -> AbstractContextManager[None]:
        """Context in which a backward pass does not exchange gradients."""
        wrapped = self._wrapped
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def score(self, images: Tensor) -> Tensor:
        """Logits [B, C] of the evaluated model; the caller sets evaluation mode."""
        with self._autocast():
            return self.evaluated.score(images.contiguous(memory_format=self._format))

    def rematch(self) -> Matching | None:
        """Update the assignment of labels to prototypes; a collective."""
        result = self.model.method.rematch()
        if self.average is not None:
            self.average.copy_buffers(self.model)
            self.average.module.method.hold_vectors()
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
            "micro_batch": self._micro_batch if self._config.train.accumulate == "auto" else None,
        }

    def release_gathered(self) -> None:
        """Keep the gathered sums on rank 0 only; call after the state was copied."""
        self.model.method.keep_on_rank_zero()
        self.meter.keep_on_rank_zero()

    def load(self, state: dict[str, Any]) -> None:
        """Restore a state dict; hyperparameters are taken from the configuration."""
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"], self._optim)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.model.method.refresh()
        if self.average is not None:
            self.average.load(state["average"], self.model)
        self.meter.load(state["meter"])
        self._recorded_size = state.get("micro_batch")  # None: not decided before
        self.release_gathered()

    @property
    def _micro_batch(self) -> int:
        """Images of a micro-batch."""
        return self._config.train.batch_size // self._world.size // self.accumulate

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

    def _step_seed(self, global_step: int, number: int) -> int:
        """Seed of a micro-batch, which has the same number among those of all processes for every world size."""
        place = self._world.rank * self.accumulate + number
        return int(random_bits(self._config.train.seed, Stream.STEP_SEED, global_step, place)) >> 1

    def _decide_accumulate(self) -> None:
        """Decide `train.accumulate=auto`: as recorded, else 1 on a CPU, else by rehearsal; a collective."""
        if self._recorded_size is not None:
            self.accumulate = count_for_size(self._config, self._world, self._recorded_size)
        elif self._world.device.type == "cuda":
            self.accumulate = fewest_that_fit(self._config, self._world, self.rehearse)
        values = self.accumulate, self._micro_batch
        log.info("train.accumulate=auto: %d micro-batch(es) of %d images per process", *values)

    def rehearse(self, count: int) -> None:
        """Run forward and backward passes on noise in the memory of a step with `count` micro-batches.

        Weights, gradients and statistics do not change. No collective follows the first large allocation. Call it
        before ``wrap``.
        """
        frozen = self.model.embedder.frozen
        self._set_frozen(isinstance(self._freeze_epochs, str))
        try:
            local = self._config.train.batch_size // self._world.size
            targets = noise_targets(self._config, self._world, self.model.method, local)
            targets = self.model.method.count_batch(targets)
            images = noise_images(self.model, self._world, local).contiguous(memory_format=self._format)
            held = later_memory(self.optimizer, self._world, images, targets)
            with discarded(self.model, self.optimizer):
                # The second micro-batch has the gradients of the first in memory.
                for images_part, targets_part in _micro_batches(images, targets, count)[:2]:
                    with self._autocast():
                        loss, *_ = self.model(images_part, *targets_part)
                    loss.backward()
            del held
        finally:
            self._set_frozen(frozen)

    def _build_buckets(self) -> None:
        """Run a forward and backward pass on noise and discard the gradients and buffer updates."""
        torch.manual_seed(self._config.train.seed)
        images = noise_images(self.model, self._world, self._micro_batch)
        images = images.contiguous(memory_format=self._format)
        targets = noise_targets(self._config, self._world, self.model.method, self._micro_batch)
        with discarded(self.model, self.optimizer):
            with self._autocast():
                loss, *_ = self._wrapped(images, *targets)
            loss.backward()


def _micro_batches(images: Tensor, targets: Targets, count: int) -> list[tuple[Tensor, Targets]]:
    return list(zip(images.chunk(count), targets.split(count), strict=True))


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
