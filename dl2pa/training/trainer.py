"""The step loop: train an epoch, match, validate, save; stop where all ranks agree."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from dl2pa.assignment import Matching
from dl2pa.config import Config, fingerprint
from dl2pa.errors import UserError
from dl2pa.osutil import write_atomically
from dl2pa.rundir import RunDirectory
from dl2pa.training.checkpoint import CheckpointStore
from dl2pa.training.display import Display
from dl2pa.training.distributed import World, gather_objects, set_collective_timeout
from dl2pa.training.environment import peak_memory
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


class Trainer:
    """One attempt's way through the run. Every rank goes through the same calls.

    Args:
        tracker: records on rank 0; does nothing on the others.
        groups: head, medium or tail for each class of long-tailed data.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        run: RunDirectory,
        train_state: TrainState,
        train_pipeline: Pipeline,
        eval_pipeline: Pipeline,
        store: CheckpointStore,
        stop: StopMonitor,
        tracker: Any,
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
        self.matchings = MatchHistory(run.matchings)
        self.progress = Progress()
        self.last_match = -1
        self.images_seen = 0
        self.train_seconds = 0.0
        self.startup: StartUp | None = None
        self._window = StepTimer(world.device)
        self._profile = StepProfile(config.train.profile, run.profile, world)

    def run(self) -> bool:
        """Go on from the current position to the end; False where a stop was agreed (the state is saved)."""
        try:
            return self._run()
        finally:
            self._keep(self._profile.finish())

    def _run(self) -> bool:
        at = self.progress
        while not at.over(self.config.train.epochs, self.config.train.max_steps):
            if at.phase == "train":
                if not self._train_epoch():
                    return self._stopped()
                self._match_after_epoch()
                at.phase = "evaluate"
            if not self._finish_epoch():
                return self._stopped()
        return True

    def _train_epoch(self) -> bool:
        at, limit = self.progress, self.config.train.max_steps
        self.train_state.begin_epoch(at.epoch)
        self.train_state.model.train()
        if not (limit and at.global_step >= limit):
            self.train_pipeline.start(at.epoch, at.step)
            self._window.open()
            for batch in self._batches():
                if self.stop.poll():
                    return False
                self._window.got_data()
                self._step(batch)
                self._window.asks_data()
                if limit and at.global_step >= limit:
                    break
            self._close_window()
        return not self.stop.poll()

    def _batches(self) -> Iterator[Batch]:
        """What is left of the epoch's."""
        batches = iter(self.train_pipeline)
        while True:
            self._profile.before_step()
            with record_function("dl2pa.data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            self._keep(self._profile.after_step())

    def _keep(self, profile: list[Path]) -> None:
        for path in profile:
            self.tracker.artifact(path, "profile")

    def _step(self, batch: Batch) -> None:
        """One step and what is due after it."""
        at, train = self.progress, self.config.train
        logs_now = (at.global_step + 1) % train.log_every_steps == 0
        norm = self.train_state.step(batch, at.global_step, want_norm=logs_now)
        if self.images_seen == 0:
            self._first_step()
        at.step += 1
        at.global_step += 1
        self.images_seen += train.batch_size
        self._window.stepped(train.batch_size)
        if logs_now:
            self._log(norm)
        self._match_after_step()
        every = self.config.checkpoint.every_steps
        if every and at.global_step % every == 0:
            self.save()
        self.display.step(at.epoch, at.step, at.global_step)

    def _first_step(self) -> None:
        set_collective_timeout(self.world, self.config.launch.step_timeout_s)
        if self.world.is_main and self.startup is not None:
            split = {name: round(seconds, 2) for name, seconds in self.startup.first_step_done().items()}
            self.run_dir.write_status(startup_s=split)

    def _finish_epoch(self) -> bool:
        """Validate, record, move on to the next epoch, save; False where a stop was agreed on the way."""
        at, train = self.progress, self.config.train
        truncated = at.step < self.train_pipeline.steps_per_epoch
        last, best = self._is_last(), False
        if last or (at.epoch + 1) % train.eval_every_epochs == 0:
            result = self._evaluate()
            if result is None:
                return False
            best = self._record(result)
        if not truncated:
            at.epoch, at.step = at.epoch + 1, 0
        at.phase = "train"
        every = self.config.checkpoint.every_epochs
        if last or (every and at.epoch % every == 0) or (best and self.config.checkpoint.keep_best):
            self.save(best=best)
        self._write_position(**({"top1": at.history[-1]["top1"]} if at.history else {}))
        return True

    def _evaluate(self) -> Evaluation | None:
        self.train_state.check_finite(self.progress.global_step, self.store.latest_name())
        self.train_state.sync_buffers()
        # What is evaluated is what the next epoch begins with: after a warm-up's matching, the prototypes.
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

    def _record(self, result: Evaluation) -> bool:
        at = self.progress
        entry = {"epoch": at.epoch + 1, "step": at.global_step, **result.metrics()}
        best = at.record(entry)
        self.tracker.metrics(at.global_step, {f"val/{k}": float(v) for k, v in entry.items() if k != "step"})
        if self.world.is_main:
            write_atomically(self.run_dir.validation, json.dumps(result.record()) + "\n")
            self._keep_predictions(result)
        self.display.validated(entry)
        return best

    def _keep_predictions(self, result: Evaluation) -> None:
        """For the pictures at the end; a disk that refuses them costs no run."""
        try:
            result.predictions.save(self.run_dir.predictions)
        except OSError as error:
            log.warning("%s cannot be written: %s", self.run_dir.predictions, error)

    def _is_last(self) -> bool:
        """Whether nothing but a validation comes after the present epoch."""
        at, train = self.progress, self.config.train
        return at.epoch + 1 >= train.epochs or (
            train.max_steps is not None and at.global_step >= train.max_steps
        )

    def _at_end(self) -> bool:
        """Whether the last step is done."""
        at, limit = self.progress, self.config.train.max_steps
        whole = at.step >= self.train_pipeline.steps_per_epoch
        return self._is_last() and (whole or (limit is not None and at.global_step >= limit))

    def _match_after_step(self) -> None:
        at = self.progress
        if self.train_state.model.method.due_after_step(at.epoch, at.global_step):
            self._rematch()

    def _match_after_epoch(self) -> None:
        if self.train_state.model.method.due_after_epoch(self.progress.epoch):
            self._rematch()

    def _rematch(self) -> None:
        """Update the assignment, once at most after a step."""
        if self.last_match == self.progress.global_step:
            return
        self.last_match = self.progress.global_step
        result = self.train_state.rematch()
        if result is not None:
            self._record_matching(result)

    def _record_matching(self, result: Matching) -> None:
        at = self.progress
        at.labels_moved.append(result.moved)
        values = {f"match/{k}": v for k, v in result.metrics().items()}
        values["time/match_s"] = result.seconds
        if result.solution is not None:
            values |= {f"time/match_{name}": value for name, value in result.solution.work().items()}
        if result.diagnostics is not None:
            values["time/insight_s"] = result.diagnostics.seconds
        self.tracker.metrics(at.global_step, values)
        if self.world.is_main:
            epochs = at.epoch + at.step / self.train_pipeline.steps_per_epoch
            self.matchings.add(at.global_step, epochs, result)
        self.display.matched(at.global_step, result.moved, result.own_cosine)

    def _log(self, norm: torch.Tensor | None) -> None:
        """Read the metrics kept on the device: the only host sync between steps."""
        at = self.progress
        memory = peak_memory(self.world.device)
        # The rank that waits longest, or holds most, is the one that matters.
        told = [int(1e6 * self._window.take_waited()), *memory.values()]
        waited, *most = self.train_state.meter.check(self.store.latest_name(), told)
        loss = self.train_state.meter.read()
        values = {"train/loss": loss, "train/lr": self.train_state.rate(at.global_step - 1)}
        if norm is not None:
            values["train/gradient_norm"] = float(norm)
        self._close_window()
        passed = self._window.read()
        seconds = max(passed.seconds, 1e-9)
        values["time/images_per_second"] = passed.images / seconds
        values["time/data_wait_share"] = min(1.0, waited / 1e6 / seconds)
        values |= {f"time/{name}": value for name, value in passed.step_percentiles().items()}
        values |= {f"memory/{name}_gib": size / 2**30 for name, size in zip(memory, most, strict=True)}
        values["time/bad_images"] = float(len(self.train_pipeline.bad_images()))
        self.tracker.metrics(at.global_step, values)
        self.display.logged(loss, values["time/images_per_second"])
        self._write_position(images_per_second=values["time/images_per_second"], loss=loss)
        self._window.open()

    def _close_window(self) -> None:
        self.train_seconds += self._window.close()

    def save(self, *, best: bool = False, wait: bool = False) -> None:
        """Write a checkpoint (in the background unless `wait`); a collective."""
        self.train_state.check_finite(self.progress.global_step, self.store.latest_name())
        state = self.train_state.state()
        met = gather_objects(self.train_pipeline.bad_images(), self.world)
        self.progress.bad_images = sorted({*self.progress.bad_images, *itertools.chain(*met)})
        if self.world.is_main:
            state.update(progress=self.progress.as_dict(), identity=self.identity)
            state.update(last_match=self.last_match)
            self.store.save(self.progress.global_step, state, best=best, wait=wait)
        self.train_state.release_gathered()
        self._check_bad(sorted({*itertools.chain(*met)}))

    def _check_bad(self, met: list[str]) -> None:
        """Each process counts its own; together they may have met too many."""
        allowed = self.train_pipeline.max_bad_images
        if len(met) > allowed:
            which = f"exceed the {allowed} allowed, over all processes; one is {met[-1]}"
            raise too_many(True, len(met), which)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.train_state.load(state)
        at = self.progress = Progress(**state["progress"])
        train = self.config.train
        unfinished = not (at.history and at.history[-1]["step"] == at.global_step)
        if at.epoch > train.epochs or (at.epoch == train.epochs and unfinished):
            remedy = f"Give at least {at.epoch + 1}."
            raise UserError("train.epochs", train.epochs, f"the run has done {at.epoch} epochs", remedy)
        if train.max_steps is not None and at.global_step > train.max_steps:
            remedy = f"Give at least {at.global_step}."
            raise UserError(
                "train.max_steps", train.max_steps, f"the run is at step {at.global_step}", remedy
            )
        self.last_match = state["last_match"]

    def _stopped(self) -> bool:
        at = self.progress
        log.info("stopping as asked: epoch %d, step %d (%s)", at.epoch, at.global_step, at.phase)
        if self.world.is_main:
            self.run_dir.write_status(state="stopping")
        self.save(wait=True)
        self._write_position()
        return False

    def _total_steps(self) -> int:
        train = self.config.train
        steps = train.epochs * self.train_pipeline.steps_per_epoch
        return steps if train.max_steps is None else min(steps, train.max_steps)

    def _write_position(self, **extra: float) -> None:
        if self.world.is_main:
            at = self.progress
            self.run_dir.write_status(
                epoch=at.epoch,
                step=at.global_step,
                phase=at.phase,
                fingerprint=fingerprint(self.config),
                total_steps=self._total_steps(),
                **extra,
            )
