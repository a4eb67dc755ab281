"""The entry of training: builds the parts, runs the loop, leaves the run directory in order."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dl2pa import envvars
from dl2pa.config import Config
from dl2pa.config.checks import warnings
from dl2pa.console import SafeFormatter
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR, TrainingFailure, UserError
from dl2pa.model.model import PrototypeInit, build_model, init_prototypes, prototypes_of_checkpoint
from dl2pa.osutil import open_private, read_json, write_json
from dl2pa.ownership import Ownership
from dl2pa.reporting.artifacts import load_run_data, make_artifacts
from dl2pa.reporting.assignment_figures import draw_assignment_figures
from dl2pa.rundir import RunDirectory
from dl2pa.tracking import Tracker
from dl2pa.training.checkpoint import CheckpointStore
from dl2pa.training.compatibility import check_resumable, identity_of
from dl2pa.training.data import (
    DataSplits,
    build_eval_pipeline,
    build_train_pipeline,
    class_counts,
    open_data,
)
from dl2pa.training.describe import NOTE_TAG, describe_run
from dl2pa.training.display import Display
from dl2pa.training.distributed import World, from_rank_zero, join_world, leave_world
from dl2pa.training.mlmodel import record_model
from dl2pa.training.record import Nodes, start_tracker
from dl2pa.training.saved import save_classifier
from dl2pa.training.startup import StartUp
from dl2pa.training.stop import StopMonitor
from dl2pa.training.train_state import TrainState
from dl2pa.training.trainer import Trainer

log = logging.getLogger(__name__)


def train(config: Config, run_dir: Path, name: str, data: DataSplits | None = None) -> int:
    """Train in this process, as one rank of torchrun's or alone; returns the exit code.

    Args:
        data: the data set where it is already open.
        run_dir: made if absent; an earlier attempt's state in it is continued.
        name: of the run, for people.

    Raises:
        UserError: wrong input, told on whichever rank met it.
    """
    run = RunDirectory(run_dir)
    run.create()
    rank = int(os.environ.get("RANK", "0"))
    owner = Ownership(run)
    before = run.status()
    try:
        if rank == 0:
            owner.acquire()
            owner.announce()
            before = run.status()
            begin_attempt(run)
        _log_to_file(run, rank)
        return _attempt(config, run, name, data)
    except BaseException as error:
        report_error(run, rank, error, before)
        raise
    finally:
        owner.release()


def begin_attempt(run: RunDirectory) -> None:
    """Rank 0: clear what the previous attempt left and count this one."""
    if not os.environ.get(envvars.LAUNCH):
        run.stop_file.unlink(missing_ok=True)
    attempt = int(run.status().get("attempt", 0)) + 1
    run.write_status(state="running", attempt=attempt, error=None, pid=os.getpid())


def report_error(run: RunDirectory, rank: int, error: BaseException, before: dict[str, Any]) -> None:
    """Leave word of why this rank ended: torchrun keeps neither exit codes nor messages.

    Args:
        before: the status this attempt found; a refused attempt leaves a finished run finished.
    """
    user = isinstance(error, UserError)
    report = {"rank": rank, **_error_fields(error)}
    with suppress(OSError):
        write_json(run.error_file(rank), report)
        if rank == 0 and not (isinstance(error, UserError) and error.field == "run-dir"):
            state = "stopped" if isinstance(error, SystemExit) else "failed"
            message = report["message"]
            if user and before.get("state") in ("finished", "stopped"):
                state = before["state"]
                message = None if state == "finished" else message
            run.write_status(state=state, error=message)


def report_node_error(run: RunDirectory, node: str, error: BaseException) -> None:
    """Leave word of an error that a node met before, or instead of, any of its ranks."""
    with suppress(OSError):
        run.logs.mkdir(parents=True, exist_ok=True)
        write_json(run.logs / f"node-{node}.error.json", {"node": node, **_error_fields(error)})


def _error_fields(error: BaseException) -> dict[str, Any]:
    user = isinstance(error, UserError)
    return {
        "time": time.time(),
        "host": os.environ.get(envvars.NODE_NAME) or socket.gethostname(),
        "launch": os.environ.get(envvars.LAUNCH),
        "exit_code": EXIT_USER_ERROR if user else EXIT_FAILURE,
        # Whether the next attempt would meet it again. An owner that is still alive will not be.
        "final": isinstance(error, UserError | TrainingFailure)
        and not (isinstance(error, UserError) and error.field in ("run-dir", "node name")),
        "error": error.as_dict() if isinstance(error, UserError) else None,
        "message": str(error) or type(error).__name__,
        "traceback": None if isinstance(error, UserError | TrainingFailure) else traceback.format_exc(),
    }


def _attempt(config: Config, run: RunDirectory, name: str, data: DataSplits | None) -> int:
    startup = StartUp()
    startup.reached("imports")
    world = join_world(config)
    startup.reached("processes")
    stop = StopMonitor(world, run.stop_file)
    stop.install()
    tracker = Tracker(run.root, enabled=False, uri=None, experiment="", run_name="", attempt=1)
    nodes: Nodes | None = None
    trainer: Trainer | None = None
    try:
        _set_numerics(config, world)
        if config.train.compile:
            _keep_compiled(run)
        data = data or open_data(config, world.size)
        startup.reached("data")
        trainer, tracker = _build(config, world, run, data, stop, name)
        startup.reached("model")
        trainer.startup = startup
        nodes = Nodes(config, world, run, tracker, int(run.status().get("attempt", 1)))
        finished = trainer.run()
        nodes.finish()
        _close(trainer, config, data, finished, name)
        from_rank_zero(None, world)  # nobody leaves before rank 0 has written everything
        return EXIT_DONE if finished else EXIT_STOPPED
    except BaseException:
        if nodes is not None:
            nodes.stop()
        tracker.finish("failed", drain_seconds=5)
        raise
    finally:
        stop.close()
        leave_world()


def _set_numerics(config: Config, world: World) -> None:
    if config.train.sync_bn and world.device.type == "cpu" and world.size > 1:
        raise UserError("train.sync_bn", True, "needs GPUs", "Set train.sync_bn=false or launch.device=cuda.")
    deterministic = config.train.deterministic
    if deterministic is None:
        deterministic = world.device.type == "cpu"
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if world.device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _keep_compiled(run: RunDirectory) -> None:
    """What torch.compile makes stays with the run: its next attempt starts with it."""
    for variable, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(variable, str(run.cache / folder))


def _build(
    config: Config, world: World, run: RunDirectory, data: DataSplits, stop: StopMonitor, name: str
) -> tuple[Trainer, Any]:
    if world.is_main:
        for sentence in warnings(config, len(data.classes)):
            log.warning(sentence)
    train_pipeline = build_train_pipeline(config, data.train, world)
    eval_pipeline = build_eval_pipeline(config, data.val, world)
    store = CheckpointStore(run.checkpoints, config.checkpoint.keep, config.checkpoint.keep_best)
    identity = {
        **identity_of(config),
        "data.fingerprint": data.fingerprint,
        "data.classes": _digest_of(data.classes),
    }
    state = _load_agreed(store, world)
    if state is not None:
        check_resumable(state["identity"], identity)
        prototype_init = prototypes_of_checkpoint(state)
    else:
        made = init_prototypes(config, len(data.classes)) if world.is_main else None
        told = from_rank_zero(None if made is None else (made.prototypes, made.assignment), world)
        prototype_init = None if told is None else PrototypeInit(*told)
    model = build_model(config, len(data.classes), prototype_init)
    counts = class_counts(data.train)
    if counts is not None:
        model.method.set_class_counts(torch.from_numpy(counts))
    train_state = TrainState(config, model, world, train_pipeline.steps_per_epoch)
    status = from_rank_zero(run.status() if world.is_main else None, world)
    tracker = start_tracker(config, world, run, data, status["attempt"], name)
    display = Display(world.is_main, train_pipeline.steps_per_epoch, config.train.epochs)
    trainer = Trainer(
        *(
            config,
            world,
            run,
            train_state,
            train_pipeline,
            eval_pipeline,
            store,
            stop,
            tracker,
            display,
            identity,
        ),
        groups=data.groups,
    )
    try:
        if state is not None:
            trainer.restore(state)
            at = trainer.progress
            log.info("resuming at epoch %d, step %d of the run (%s)", at.epoch, at.global_step, at.phase)
        if world.is_main:
            trainer.matchings.cut_after(trainer.last_match)
        train_state.wrap()
        train_state.release_gathered()
    except BaseException:
        tracker.finish("failed", drain_seconds=5)
        raise
    return trainer, tracker


def _load_agreed(store: CheckpointStore, world: World) -> dict[str, Any] | None:
    """The checkpoint rank 0 could read; all ranks read the same one."""
    state: dict[str, Any] | None = None
    if world.is_main:
        store.clean()
        state = store.load(discard=True)
    if world.size > 1:
        step = from_rank_zero(None if state is None else state["progress"]["global_step"], world)
        if not world.is_main and step is not None:
            state = torch.load(store.path(step) / "state.pt", map_location="cpu", weights_only=True)
    return state


def _close(trainer: Trainer, config: Config, data: DataSplits, finished: bool, name: str) -> None:
    """Wait for the last checkpoint, write the model and the result, end the tracking."""
    trainer.display.close()
    trainer.train_pipeline.close()
    trainer.eval_pipeline.close()
    run, tracker = trainer.run_dir, trainer.tracker
    if not trainer.world.is_main:
        return
    trainer.store.wait()
    if not finished:
        tracker.finish("stopped", drain_seconds=5)
        run.write_status(state="stopped")
        return
    save_classifier(run.model, trainer.train_state.evaluated, config, data.classes, data.groups)
    result = summarize(trainer, config, len(data.classes))
    write_json(run.result, result)
    for path in (run.validation, run.result):
        tracker.artifact(path)
    if run.matchings.exists():
        tracker.artifact(run.matchings)
    if config.tracking.enabled:
        if config.tracking.figures:
            _show(trainer, config, data, result, name)
        command = read_json(run.environment)["attempts"][-1]["command"]
        tracker.tags({NOTE_TAG: describe_run(config, name, command, result)})
    record_model(tracker, run, config, data.val, result)
    tracker.finish("finished")
    result["mlflow_run_id"] = tracker.mlflow_run_id
    write_json(run.result, result)
    run.write_status(state="finished")


def _show(trainer: Trainer, config: Config, data: DataSplits, result: dict[str, Any], name: str) -> None:
    """Draw what people look at. Whatever fails is said and costs the run nothing."""
    run, tracker = trainer.run_dir, trainer.tracker
    drawn = draw_assignment_figures(
        run, trainer.train_state.model.method, trainer.matchings.records(), data.classes
    )
    try:
        ids = tracker.run_uuid, tracker.mlflow_run_id
        steps = trainer.train_pipeline.steps_per_epoch
        run_data = load_run_data(run, config, data, result, config.tracking.run_name or name, steps, ids)
        made = make_artifacts(run, run_data, config, data, drawn)
    except Exception as error:
        log.warning("no summary of the run: %s: %s", type(error).__name__, error)
        made = [(path, "pictures") for path in drawn]
    for path, folder in made:
        tracker.artifact(path, folder)


def summarize(trainer: Trainer, config: Config, num_classes: int) -> dict[str, Any]:
    """The run's result, as `train --json` prints it."""
    at = trainer.progress
    last = at.history[-1]
    return {
        "top1_last": last["top1"],
        "top1_best": max(h["top1"] for h in at.history),
        "top5_last": last["top5"],
        "ece_last": last["ece"],
        **{key: value for key, value in last.items() if key.startswith("top1_")},
        "num_validated": last["num_validated"],
        "num_missing": last.get("num_missing", 0),
        "epochs": at.epoch,
        "steps": at.global_step,
        "world_size": trainer.world.size,
        "labels_moved": at.labels_moved,
        "images_per_second": trainer.images_seen / max(trainer.train_seconds, 1e-9)
        if trainer.images_seen
        else None,
        "bad_images": at.bad_images,
        "run_dir": str(trainer.run_dir.root),
        "mlflow_run_id": trainer.tracker.mlflow_run_id,
        "method": config.method.name,
        "loss": config.loss,
        "assignment": config.assignment,
        "dim": config.model.embedding_dim,
        "num_classes": num_classes,
    }


def _digest_of(classes: tuple[str, ...]) -> str:
    """Names and order of the classes in one short text."""
    return f"{len(classes)} classes, {hashlib.sha256(json.dumps(classes).encode()).hexdigest()[:8]}"


def _log_to_file(run: RunDirectory, rank: int) -> None:
    """Everything this rank says also goes to its log; ranks other than 0 say it there only."""
    path = run.logs / f"rank-{rank}.log"
    open_private(path, "a").close()
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    if rank != 0:
        for other in list(root.handlers):
            if other is not handler:
                root.removeHandler(other)
        target = path.open("a", encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(target.fileno(), 1)
        os.dup2(target.fileno(), 2)
