"""Entry of training: build the parts of one attempt, run the step loop, keep status and error reports."""

from __future__ import annotations

import logging
import os
import socket
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dl2pa import envvars
from dl2pa.config import Config
from dl2pa.config.identity import check_resumable, checkpoint_identity, data_identity
from dl2pa.config.rate import describe_rate
from dl2pa.config.warnings import warnings
from dl2pa.errors import (
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    TRANSIENT_FIELDS,
    StorageUnavailable,
    TrainingFailure,
    UserError,
)
from dl2pa.model.init import load_initial_weights
from dl2pa.model.model import Model, PrototypeInit, build_model, init_prototypes, prototypes_of_checkpoint
from dl2pa.osutil import DiskFull, private_temporary_folder, write_json
from dl2pa.ownership import Ownership
from dl2pa.rundir import RunDirectory
from dl2pa.tracking import Tracker
from dl2pa.training.calibrate import Calibration, calibrate
from dl2pa.training.checkpoint import CheckpointStore
from dl2pa.training.data import (
    DataSplits,
    build_eval_pipeline,
    build_train_pipeline,
    class_counts,
    log_skipped,
    open_data,
)
from dl2pa.training.display import Display
from dl2pa.training.distributed import World, from_rank_zero, join_world, leave_world
from dl2pa.training.finish import Report, finish_run
from dl2pa.training.progress import Progress
from dl2pa.training.rank_log import log_attempt, log_error, log_to_file
from dl2pa.training.record import Nodes, start_tracker
from dl2pa.training.startup import StartUp
from dl2pa.training.stop import StopMonitor
from dl2pa.training.train_state import TrainState
from dl2pa.training.trainer import Trainer, total_steps

log = logging.getLogger(__name__)

_RESERVE = 8 << 20
"""Bytes of memory that are freed when an attempt fails, so that the error can be reported if memory is exhausted."""


def train(
    config: Config,
    run_dir: Path,
    name: str,
    data: DataSplits | None = None,
    on_finished: Report | None = None,
) -> int:
    """Train in this process, alone or as one rank of torchrun; returns the exit code.

    Args:
        run_dir: created if missing; training continues from the checkpoints in it.
        name: name of the configuration, for display.
        data: the data set, if it is already open.
        on_finished: draws the report of the finished run; called on rank 0 if `tracking.figures` is true.

    Raises:
        UserError: invalid input, raised on the rank that detects it.
    """
    run = RunDirectory(run_dir)
    run.create()
    rank = int(os.environ.get("RANK", "0"))
    owner = Ownership(run)
    before = run.status()
    reserve = bytearray(_RESERVE)
    file: logging.Handler | None = None
    try:
        if rank == 0:
            owner.acquire()
            owner.announce()
            before = run.status()
            begin_attempt(run)
        file = log_to_file(run, rank)
        if rank == 0:
            log_attempt(rank, int(run.status()["attempt"]))
        return _attempt(config, run, owner, name, data, on_finished)
    except BaseException as error:
        del reserve
        report_error(run, rank, error, before)
        if file is not None and not isinstance(error, SystemExit):
            fields = _error_fields(error)
            log_error(file, fields["traceback"] or fields["message"])
        raise
    finally:
        owner.release()


def begin_attempt(run: RunDirectory) -> None:
    """Remove the stop file of the previous attempt and count this attempt; rank 0 only."""
    if not os.environ.get(envvars.LAUNCH):
        run.stop_file.unlink(missing_ok=True)
    status, now = run.status(), time.time()
    run.write_status(
        state="running",
        attempt=int(status.get("attempt", 0)) + 1,
        started=status.get("started") or now,
        attempt_started=now,
        error=None,
        pid=os.getpid(),
    )


def report_error(run: RunDirectory, rank: int, error: BaseException, before: dict[str, Any]) -> None:
    """Write why this rank failed to the run directory: torchrun reports neither exit codes nor messages.

    Args:
        before: status before this attempt, which stays that of the run if the attempt is refused.
    """
    report = {"rank": rank, **_error_fields(error)}
    refused = isinstance(error, UserError) and not run.is_accepted()
    with suppress(OSError, MemoryError):
        write_json(run.error_file(rank, refused=refused), report)
    if rank != 0 or (isinstance(error, UserError) and error.field == "run-dir"):
        return
    with suppress(OSError, MemoryError):
        if refused:
            run.withdraw_attempt(before, str(report["message"]))
        else:
            state = "stopped" if isinstance(error, SystemExit) else "failed"
            run.write_status(state=state, error=report["message"])


def report_node_error(run: RunDirectory, node: str, error: BaseException) -> None:
    """Write an error of a node, raised outside its ranks, to the run directory."""
    with suppress(OSError):
        run.logs.mkdir(parents=True, exist_ok=True)
        write_json(run.node_error_file(node), {"node": node, **_error_fields(error)})


def _error_fields(error: BaseException) -> dict[str, Any]:
    user = isinstance(error, UserError)
    return {
        "time": time.time(),
        "host": os.environ.get(envvars.NODE_NAME) or socket.gethostname(),
        "launch": os.environ.get(envvars.LAUNCH),
        "exit_code": EXIT_USER_ERROR if user else EXIT_FAILURE,
        # Whether a retry would fail too.
        "final": isinstance(error, UserError | TrainingFailure)
        and not (isinstance(error, UserError) and error.field in TRANSIENT_FIELDS),
        "error": error.as_dict() if isinstance(error, UserError) else None,
        "message": _message(error),
        "traceback": None
        if isinstance(error, UserError | TrainingFailure | DiskFull | StorageUnavailable)
        else traceback.format_exc(),
    }


def _message(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return f"out of memory: {text}" if isinstance(error, MemoryError) else text


def _attempt(
    config: Config,
    run: RunDirectory,
    owner: Ownership,
    name: str,
    data: DataSplits | None,
    on_finished: Report | None,
) -> int:
    startup = StartUp()
    startup.reached("imports")
    world = join_world(config)
    startup.reached("processes")
    stop = StopMonitor(world, run.stop_file)
    stop.install()
    tracker = Tracker(run.root, enabled=False, uri=None, experiment="", run_name="", attempt=1)
    nodes: Nodes | None = None
    trainer: Trainer | None = None
    store = CheckpointStore(run.checkpoints, config.checkpoint.keep, config.checkpoint.keep_best)
    try:
        attempt = int(run.status().get("attempt", 1)) if world.is_main else 0
        owner_id, attempt = from_rank_zero((owner.id, attempt), world)
        if world.is_main:
            store.start()
        else:
            owner.follow(owner_id)
            log_attempt(world.rank, attempt)
        if config.train.compile:
            _cache_compiled_code()
        data = data or open_data(config, world.size)
        startup.reached("data")
        trainer = _build(config, world, run, data, stop, store, name)
        tracker = trainer.tracker
        startup.reached("model")
        trainer.startup = startup
        nodes = Nodes(config, world, run, tracker, int(run.status().get("attempt", 1)))
        trainer.gpu_use = nodes.gpu_use
        finished, calibration = trainer.run(), None
        if finished:
            finished, calibration = calibrate(trainer, data)
        nodes.finish()
        _close(trainer, data, name, finished, on_finished, calibration)
        from_rank_zero(None, world)  # all ranks wait until rank 0 has written everything
        leave_world()  # not after a failure: NCCL may wait there for ranks that hang in a collective
        return EXIT_DONE if finished else EXIT_STOPPED
    except BaseException:
        if nodes is not None:
            nodes.stop()
        if trainer is not None:
            trainer.display.close()
        tracker.finish("failed", drain_seconds=5)
        raise
    finally:
        store.close()
        stop.close()


def _cache_compiled_code() -> None:
    """Keep torch.compile's caches on this node: on a shared file system, all ranks would write the same files."""
    folder = private_temporary_folder("compiled")
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(variable, str(folder / name))


def _build(
    config: Config,
    world: World,
    run: RunDirectory,
    data: DataSplits,
    stop: StopMonitor,
    store: CheckpointStore,
    name: str,
) -> Trainer:
    """Build the trainer, restored from the latest checkpoint if there is one; a collective."""
    if world.is_main:
        for message in warnings(config, len(data.classes)):
            log.warning(message)
        log.info("learning rate: %s", describe_rate(config))
        log_skipped(data)
    train_pipeline = build_train_pipeline(config, data.train, world)
    eval_pipeline = build_eval_pipeline(config, data.val, world)
    identity = {**checkpoint_identity(config), **data_identity(data.fingerprint, data.classes)}
    checkpoint = _load_checkpoint(store, world)
    if checkpoint is not None:
        check_resumable(checkpoint["identity"], identity)
        Progress(**checkpoint["progress"]).check_end(config.train.epochs, config.train.max_steps)
        prototype_init = prototypes_of_checkpoint(checkpoint)
    else:
        prototype_init = _init_prototypes(config, len(data.classes), world)
    model = build_model(config, len(data.classes), prototype_init)
    init = None if checkpoint is not None else _load_initial_weights(config, model, world)
    counts = class_counts(data.train)
    if counts is not None:
        model.method.set_class_counts(torch.from_numpy(counts))
    train_state = TrainState(config, model, world, train_pipeline.steps_per_epoch)
    status = from_rank_zero(run.status() if world.is_main else None, world)
    tracker = start_tracker(config, world, run, data, status["attempt"], name, init)
    try:
        trainer = Trainer(
            config,
            world,
            run,
            train_state=train_state,
            train_pipeline=train_pipeline,
            eval_pipeline=eval_pipeline,
            store=store,
            stop=stop,
            tracker=tracker,
            display=_display(config, world, train_pipeline.steps_per_epoch),
            identity=identity,
            groups=data.groups,
        )
        if checkpoint is not None:
            trainer.restore(checkpoint)
        if world.is_main:
            trainer.match_history.cut_after(trainer.last_update)
        train_state.wrap()
        train_state.release_gathered()
    except BaseException:
        tracker.finish("failed", drain_seconds=5)
        raise
    return trainer


def _display(config: Config, world: World, steps_per_epoch: int) -> Display:
    total = total_steps(config, steps_per_epoch)
    return Display(world.is_main, steps_per_epoch, config.train.epochs, total)


def _init_prototypes(config: Config, num_classes: int, world: World) -> PrototypeInit | None:
    """Construct the prototypes on rank 0 and send them to every rank; a collective."""
    result = init_prototypes(config, num_classes) if world.is_main else None
    tensors = from_rank_zero(None if result is None else (result.prototypes, result.assignment), world)
    return None if tensors is None else PrototypeInit(*tensors)


def _load_initial_weights(config: Config, model: Model, world: World) -> dict[str, Any] | None:
    """Load `model.init` on rank 0 and send the weights to every rank; a collective. Returns the record of the file."""
    if config.model.init is None:
        return None
    record = load_initial_weights(config, model.embedder).as_dict() if world.is_main else None
    if world.size > 1:
        weights = from_rank_zero(dict(model.embedder.state_dict()) if world.is_main else None, world)
        model.embedder.load_state_dict(weights)
    return record


def _load_checkpoint(store: CheckpointStore, world: World) -> dict[str, Any] | None:
    """Load the latest checkpoint that rank 0 can read, the same on every rank; None without one."""
    state: dict[str, Any] | None = None
    if world.is_main:
        store.clean()
        state = store.load(discard=True)
    if world.size > 1:
        step = from_rank_zero(None if state is None else state["progress"]["global_step"], world)
        if not world.is_main and step is not None:
            state = torch.load(store.state_file(step), map_location="cpu", weights_only=True)
    return state


def _close(
    trainer: Trainer,
    data: DataSplits,
    name: str,
    finished: bool,
    on_finished: Report | None,
    calibration: Calibration | None,
) -> None:
    """Close display and pipelines, wait for the last checkpoint, write the results of a finished run."""
    trainer.display.close()
    trainer.train_pipeline.close()
    trainer.eval_pipeline.close()
    if not trainer.world.is_main:
        return
    trainer.store.wait()
    if finished:
        finish_run(trainer, data, name, on_finished, calibration)
    else:
        trainer.tracker.finish("stopped", drain_seconds=5)
        trainer.run_dir.write_status(state="stopped")
