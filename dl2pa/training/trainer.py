"""Training loop of one attempt: train an epoch, update the assignment, validate, save; stop when all ranks agree."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dl2pa.assignment import Matching
from dl2pa.config import Config, fingerprint
from dl2pa.osutil import reason_of, write_atomically
from dl2pa.rundir import RunDirectory
from dl2pa.step_parts import part
from dl2pa.tracking import Tracker
from dl2pa.training.checkpoint import CheckpointStore
from dl2pa.training.display import Display, RemainingTime
from dl2pa.training.distributed import World, gather_objects, set_collective_timeout
from dl2pa.training.environment import memory_usage
from dl2pa.training.evaluate import Evaluation, evaluate
from dl2pa.training.match_history import MatchHistory
from dl2pa.training.profile import StepProfile
from dl2pa.training.progress import Progress
from dl2pa.training.startup import StartUp
from dl2pa.training.stop import StopMonitor
from dl2pa.training.timer import StepTimer
from dl2pa.training.train_state import TrainState
from pipelines.batch import Batch, Pipeline
from pipelines.encoded import too_many
from pipelines.longtail import Group

log = logging.getLogger(__name__)
_NOT_CHARTED = ("step", "epoch", "num_validated")


class Trainer:
    """Training loop of one attempt. Every rank makes the same calls in the same order.

    Args:
        tracker: enabled on rank 0 only.
        identity: what a checkpoint must agree with to be resumed.
        groups: head, medium or tail per class of long-tailed data.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        run: RunDirectory,
        *,
        train_state: TrainState,
        train_pipeline: Pipeline,
        eval_pipeline: Pipeline,
        store: CheckpointStore,
        stop: StopMonitor,
        tracker: Tracker,
        display: Display,
        identity: dict[str, Any],
        groups: tuple[Group, ...] | None = None,
    ) -> None:
        self.config = config
        self.world = world
        self.run_dir = run
        self.train_state = train_state
        self.train_pipeline = train_pipeline
        self.eval_pipeline = eval_pipeline
        self.store = store
        self.stop = stop
        self.tracker = tracker
        self.display = display
        self.identity = identity
        self.groups = groups
        self.match_history = MatchHistory(run.matchings)
        self.progress = Progress()
        self.last_update = -1
        """Global step of the last assignment update."""
        self.images_seen = 0
        self.train_seconds = 0.0
        self.startup: StartUp | None = None
        self.gpu_use: Callable[[], float | None] = lambda: None
        """Utilization of the GPUs of this node in percent, measured in the background; None if unknown."""
        self._remaining = RemainingTime(self.total_steps)
        self._status_failed = False
        self._timer = StepTimer(world.device)
        self._profile = StepProfile(config.train.profile, run.profile, world)

    def run(self) -> bool:
        """Train to the end. False if all ranks agreed to stop earlier; the state is then saved."""
        try:
            return self._run()
        finally:
            self._record_profile(self._profile.finish())

    def _run(self) -> bool:
        progress = self.progress
        while not (self._is_at_end() or self._is_exhausted()):
            if progress.phase == "train":
                if not self._train_epoch():
                    return self._stop()
                if self.train_state.model.method.due_after_epoch(progress.epoch):
                    self._update_assignment()
                progress.phase = "evaluate"
            if not self._finish_epoch():
                return self._stop()
        if self.stopped_early:
            self.display.stopped_early(progress.history, progress.best)
        return True

    def _is_at_end(self) -> bool:
        return self.progress.over(self.config.train.epochs, self.config.train.max_steps)

    def _is_exhausted(self) -> bool:
        """Whether `train.patience` ends the run; equal on all ranks, which have the same validation results."""
        frozen = self.config.model.freeze_epochs
        warmup = self.config.method.match.warmup_epochs if self.config.assignment == "dynamic" else 0
        first_epoch = max(warmup, frozen if isinstance(frozen, int) else 0)
        return self.progress.is_exhausted(self.config.train.patience, first_epoch)

    @property
    def stopped_early(self) -> bool:
        """Whether `train.patience` ended the run before its last epoch."""
        return self._is_exhausted() and not self._is_at_end()

    @property
    def total_steps(self) -> int:
        """Steps of the run, unless `train.patience` ends it."""
        return total_steps(self.config, self.train_pipeline.steps_per_epoch)

    def _train_epoch(self) -> bool:
        """Train the rest of the epoch; False if all ranks agreed to stop."""
        progress = self.progress
        self.train_state.begin_epoch(progress.epoch)
        self.train_state.model.train()
        if not self._at_step_limit():
            self.train_pipeline.start(progress.epoch, progress.step)
            self._timer.start()
            for batch in self._batches():
                if self.stop.poll():
                    return False
                self._timer.data_received()
                self._step(batch)
                self._timer.data_requested()
                if self._at_step_limit():
                    break
            self._pause_timer()
        return not self.stop.poll()

    def _at_step_limit(self) -> bool:
        limit = self.config.train.max_steps
        return limit is not None and self.progress.global_step >= limit

    def _batches(self) -> Iterator[Batch]:
        """Yield the remaining batches of the epoch."""
        batches = iter(self.train_pipeline)
        while True:
            self._profile.before_step()
            with part("dl2pa.data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            self._record_profile(self._profile.after_step())

    def _record_profile(self, files: list[Path]) -> None:
        for path in files:
            self.tracker.artifact(path, "profile")

    def _step(self, batch: Batch) -> None:
        """Run one training step, then log, update the assignment and save if they are due."""
        progress, train = self.progress, self.config.train
        log_due = (progress.global_step + 1) % train.log_every_steps == 0
        norm = self.train_state.step(batch, progress.global_step, want_norm=log_due)
        if self.images_seen == 0:
            self._first_step_done()
        progress.step += 1
        progress.global_step += 1
        self.images_seen += train.batch_size
        self._timer.step_done(train.batch_size)
        if log_due:
            self._log_metrics(norm)
        if self.train_state.model.method.due_after_step(progress.epoch, progress.global_step):
            self._update_assignment()
        every = self.config.checkpoint.every_steps
        if every and progress.global_step % every == 0:
            self.save()
        self.display.step(progress.epoch, progress.step, progress.global_step)

    def _first_step_done(self) -> None:
        set_collective_timeout(self.world, self.config.launch.step_timeout_s)
        if self.world.is_main and self.startup is not None:
            stages = {name: round(seconds, 2) for name, seconds in self.startup.first_step_done().items()}
            self.run_dir.write_status(startup_s=stages)

    def _finish_epoch(self) -> bool:
        """Validate, record, advance to the next epoch and save; False if all ranks agreed to stop."""
        progress, train = self.progress, self.config.train
        truncated = progress.step < self.train_pipeline.steps_per_epoch
        last = progress.epoch + 1 >= train.epochs or self._at_step_limit()
        best = False
        if last or (progress.epoch + 1) % train.eval_every_epochs == 0:
            result = self._evaluate()
            if result is None:
                return False
            best = self._record_evaluation(result)
            last = last or self._is_exhausted()
        if not truncated:
            progress.epoch, progress.step = progress.epoch + 1, 0
        progress.phase = "train"
        every = self.config.checkpoint.every_epochs
        if last or (every and progress.epoch % every == 0) or (best and self.config.checkpoint.keep_best):
            self.save(best=best)
        self._write_status(**progress.accuracies())
        return True

    def _evaluate(self) -> Evaluation | None:
        self.train_state.check_finite(self.progress.global_step, self.store.latest_name())
        self.train_state.sync_buffers()
        # Evaluate the state that the next epoch starts from: after a warm-up's last update that is the prototypes.
        self.train_state.begin_epoch(self.progress.epoch + 1)
        model = self.train_state.evaluated
        model.eval()
        total = self.eval_pipeline.steps_per_epoch
        result = evaluate(
            self.train_state.score,
            self.eval_pipeline,
            model.method.num_classes,
            self.stop.poll,
            lambda done: self.display.evaluating(done, total),
            self.groups,
            self.config.method.max_logits,
        )
        self.train_state.model.train()
        return result

    def _record_evaluation(self, result: Evaluation) -> bool:
        """Record a validation; True if its top-1 accuracy is the best so far."""
        progress = self.progress
        entry = {"epoch": progress.epoch + 1, "step": progress.global_step, **result.metrics()}
        best = progress.record(entry)
        # MLflow would chart the number of images, which is constant, and the epoch over the step.
        values = {f"val/{k}": float(v) for k, v in entry.items() if k not in _NOT_CHARTED}
        self.tracker.metrics(progress.global_step, values)
        if self.world.is_main:
            write_atomically(self.run_dir.validation, json.dumps(result.record()) + "\n")
            try:
                result.predictions.save(self.run_dir.predictions)
            except OSError as error:  # only the report needs the predictions
                log.warning("%s cannot be written: %s", self.run_dir.predictions, reason_of(error))
        self.display.validated(entry)
        return best

    def _update_assignment(self) -> None:
        """Update the assignment, at most once per global step; a collective."""
        if self.last_update == self.progress.global_step:
            return
        self.last_update = self.progress.global_step
        result = self.train_state.rematch()
        if result is not None:
            self._record_assignment_update(result)

    def _record_assignment_update(self, result: Matching) -> None:
        progress = self.progress
        progress.labels_moved.append(result.moved)
        values = {f"match/{k}": v for k, v in result.metrics().items()}
        if result.classes_seen == self.train_state.model.method.num_classes:
            del values["match/classes_seen"]  # MLflow would chart a constant
        values["time/match_s"] = result.seconds
        if result.solution is not None:
            values |= {f"time/match_{name}": value for name, value in result.solution.work().items()}
        if result.diagnostics is not None:
            values["time/insight_s"] = result.diagnostics.seconds
        self.tracker.metrics(progress.global_step, values)
        if self.world.is_main:
            epochs = progress.epoch + progress.step / self.train_pipeline.steps_per_epoch
            self.match_history.add(progress.global_step, epochs, result)
        self.display.assignment_updated(progress.global_step, result.moved, result.own_cosine)

    def _log_metrics(self, norm: torch.Tensor | None) -> None:
        """Read the metrics kept on the device and record them: the only host sync between steps."""
        step = self.progress.global_step
        memory = memory_usage(self.world.device)
        figures = [
            int(1e6 * self._timer.take_data_wait()),
            *memory.values(),
        ]  # the maximum over ranks is logged
        data_wait, *most_memory = self.train_state.meter.check(self.store.latest_name(), figures)
        loss = self.train_state.meter.read()
        rate = self.train_state.rate(step - 1)
        values = {"train/loss": loss, "train/lr": rate}
        if norm is not None:
            values["train/gradient_norm"] = float(norm)
        self._pause_timer()
        timings = self._timer.read()
        seconds = max(timings.seconds, 1e-9)
        values["time/images_per_second"] = timings.images / seconds
        values["time/data_wait_share"] = min(1.0, data_wait / 1e6 / seconds)
        values |= {f"time/{name}": value for name, value in timings.step_percentiles().items()}
        values |= {f"memory/{name}_gib": n / 2**30 for name, n in zip(memory, most_memory, strict=True)}
        if bad_images := self.train_pipeline.bad_images():
            values["time/bad_images"] = float(len(bad_images))
        self.tracker.metrics(step, values)
        speed = values["time/images_per_second"]
        left = self._remaining.estimate(step, self.config.train.batch_size / max(speed, 1e-9))
        self.display.logged(self.progress.epoch, step, loss, rate, speed, left)
        self._write_status(
            images_per_second=speed, loss=loss, lr=rate, eta_seconds=left, gpu_percent=self.gpu_use()
        )
        self._timer.start()

    def _pause_timer(self) -> None:
        self.train_seconds += self._timer.pause()

    def save(self, *, best: bool = False, wait: bool = False) -> None:
        """Write a checkpoint, in the background unless `wait`; a collective."""
        self.train_state.check_finite(self.progress.global_step, self.store.latest_name())
        state = self.train_state.state()
        bad_images = {*itertools.chain(*gather_objects(self.train_pipeline.bad_images(), self.world))}
        self.progress.bad_images = sorted({*self.progress.bad_images, *bad_images})
        if self.world.is_main:
            state.update(progress=self.progress.as_dict(), identity=self.identity)
            state.update(last_match=self.last_update)
            self.store.save(self.progress.global_step, state, best=best, wait=wait)
        self.train_state.release_gathered()
        self._check_bad_images(sorted(bad_images))

    def _check_bad_images(self, bad_images: list[str]) -> None:
        """Check the unreadable images of all ranks together; each rank has checked its own."""
        allowed = self.train_pipeline.max_bad_images
        if len(bad_images) > allowed:
            message = f"exceed the {allowed} allowed, over all processes; one is {bad_images[-1]}"
            raise too_many(True, len(bad_images), message)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint that ``Progress.check_end`` accepts."""
        self.train_state.load(state)
        progress = self.progress = Progress(**state["progress"])
        self.last_update = state["last_match"]
        position = progress.epoch, progress.global_step, progress.phase
        log.info("resuming at epoch %d, step %d of the run (%s)", *position)

    def _stop(self) -> bool:
        """Save the state of a run that was asked to stop; returns False."""
        progress = self.progress
        log.info(
            "stopping on request: epoch %d, step %d (%s)",
            progress.epoch,
            progress.global_step,
            progress.phase,
        )
        if self.world.is_main:
            self.run_dir.write_status(state="stopping")
        self.save(wait=True)
        self._write_status()
        return False

    def _write_status(self, **extra: float | None) -> None:
        if not self.world.is_main:
            return
        progress = self.progress
        try:
            self.run_dir.write_status(
                epoch=progress.epoch,
                step=progress.global_step,
                phase=progress.phase,
                fingerprint=fingerprint(self.config),
                epochs=self.config.train.epochs,
                total_steps=progress.global_step if self.stopped_early else self.total_steps,
                **extra,
            )
            self._status_failed = False
        except OSError as error:  # the next status or checkpoint may be written again
            if not self._status_failed:
                log.warning("%s cannot be written (%s)", self.run_dir.status_file, reason_of(error))
            self._status_failed = True


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Steps of a run that `train.patience` does not end."""
    steps = config.train.epochs * steps_per_epoch
    return steps if config.train.max_steps is None else min(steps, config.train.max_steps)
