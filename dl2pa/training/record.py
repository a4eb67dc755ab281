"""Record an attempt: configuration, environment, code and data at its start, node metrics, the model at its end."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

import torch

from dl2pa import envvars
from dl2pa.config import Config, dump_config, flatten
from dl2pa.config.identity import data_identity, run_title
from dl2pa.config.tracking import sync_command
from dl2pa.model.example import write_example
from dl2pa.osutil import write_atomically, write_json
from dl2pa.rundir import RunDirectory
from dl2pa.specs import FEATURES
from dl2pa.tracking import Tracker, choose_uri
from dl2pa.tracking.nodes import NodeFile, NodeWatch, OtherNodes
from dl2pa.tracking.payloads import dataset_payload, model_payload, run_tags
from dl2pa.training.data import DataSplits, class_counts
from dl2pa.training.distributed import World, from_rank_zero, gather_objects
from dl2pa.training.environment import bitwise_differences, describe_environment, write_code
from pipelines.dataset import Dataset, num_samples
from pipelines.datasets.holdout import CALIBRATION_SEED, SPLIT_SEED

log = logging.getLogger(__name__)


def start_tracker(
    config: Config,
    world: World,
    run: RunDirectory,
    data: DataSplits,
    attempt: int,
    name: str,
    init: Mapping[str, Any] | None = None,
) -> Tracker:
    """Write configuration, environment and code to the run directory and start tracking; a collective.

    Args:
        init: record of the initial weights, if this attempt loaded them.
    """
    hosts = gather_objects(os.environ.get(envvars.NODE_NAME) or socket.gethostname(), world)
    environment = describe_environment(world, hosts)
    tracker = Tracker(
        run.root,
        enabled=config.tracking.enabled and world.is_main,
        uri=choose_uri(config.tracking.uri, run.root.parent),
        experiment=config.tracking.experiment,
        run_name=config.tracking.run_name or run_title(config, name),
        attempt=attempt,
        sync_command=sync_command(config.tracking.uri, run.root.absolute()),
    )
    if not world.is_main:
        return tracker
    run.set_aside_environment()
    earlier = run.attempts()
    if earlier and (changes := bitwise_differences(earlier[-1], environment)):
        log.warning("results may differ in the last bits from the previous attempt's: %s", "; ".join(changes))
    identity = data_identity(data.fingerprint, data.classes)
    entry = {"data_fingerprint": data.fingerprint, "data_classes": identity["data.classes"], **environment}
    if config.data.val_fraction is not None:
        entry["val_split"] = {"val_fraction": config.data.val_fraction, "seed": SPLIT_SEED}
        entry["val_split"] |= {"num_train": num_samples(data.train), "num_val": num_samples(data.val)}
    if data.calibration is not None:
        fraction, count = config.data.calibration_fraction, num_samples(data.calibration)
        entry["calibration_split"] = {"calibration_fraction": fraction, "seed": CALIBRATION_SEED}
        entry["calibration_split"] |= {"num_calibration": count, "fingerprint": data.calibration.fingerprint}
    if init is not None:
        entry["init"] = init
    attempts = [*earlier, {"attempt": attempt, **entry}]
    write_json(run.environment, {"attempts": attempts}, indent=1)
    write_atomically(run.config, dump_config(config, redacted=True))
    if os.environ.get(envvars.SUPERVISED) and run.submission.is_dir():
        write_atomically(run.accepted_config, dump_config(config, redacted=True))
    num_classes = len(data.classes)
    tracker.start(
        {**flatten(config), "num_classes": num_classes},
        {**run_tags(config, name, environment, num_classes, data.fingerprint), **_init_tags(init)},
    )
    splits = {"training": data.train, "validation": data.val, "calibration": data.calibration}
    tracker.inputs([_describe_split(config, s, context) for context, s in splits.items() if s is not None])
    for path in (run.config, run.environment):
        tracker.artifact(path)
    if tracker.enabled:
        for path in write_code(run.code, attempt):
            tracker.artifact(path, run.code.name)
    return tracker


def _init_tags(init: Mapping[str, Any] | None) -> dict[str, str]:
    """Tags of the initial weights; a resumed run keeps those of its first attempt."""
    return {} if init is None else {"dl2pa.init": init["source"], "dl2pa.init_sha256": init["sha256"]}


def _describe_split(config: Config, dataset: Dataset, context: str) -> dict[str, str]:
    counts = class_counts(dataset)
    return dataset_payload(
        config,
        context,
        images=num_samples(dataset),
        classes=len(dataset.classes),
        counts=None if counts is None else counts.tolist(),
        digest=dataset.fingerprint,
        root=getattr(dataset, "root", None),
    )


def record_model(
    tracker: Tracker, run: RunDirectory, config: Config, val: Dataset, result: Mapping[str, Any]
) -> None:
    """Record the finished model. A failure is reported by the tracker and does not stop the run.

    Args:
        val: validation set; its first image becomes the input example.
        result: result of the run; its accuracies become tags of the model.
    """
    if not tracker.enabled:
        return
    if config.data.dataset == FEATURES:
        log.info(
            "a model of features is not logged to MLflow; `dl2pa export RUN` joins it with the frozen network"
        )
        return
    try:
        example = write_example(run, val)
        fields = model_payload(run, config, result)
    except Exception as error:
        tracker.note_failure("model", error)
        return
    tracker.model(**fields, example=None if example is None else example.name)


class Nodes:
    """System metrics of every node, measured by the first rank on each. Create one on every rank.

    Args:
        tracker: rank 0's tracker receives the metrics.
    """

    def __init__(
        self, config: Config, world: World, run: RunDirectory, tracker: Tracker, attempt: int
    ) -> None:
        self._world = world
        self._tracker = tracker
        self._others = OtherNodes(run.root)
        self._watch: NodeWatch | None = None
        created: int | None = from_rank_zero(tracker.created, world)
        interval = config.tracking.system_every_s
        if created is None or not interval or world.local_rank != 0:
            return
        node = int(os.environ.get("GROUP_RANK", world.rank // max(1, world.local_size)))
        write = tracker.metrics if world.is_main else NodeFile(run.root, node, attempt).write
        collect = self._collect if world.is_main and world.size > world.local_size else _do_nothing
        try:
            self._watch = NodeWatch(node, write, created, interval, _gpu_ids(world), run.root, collect)
            self._watch.start()
        except Exception as error:  # psutil is missing or does not support this machine
            log.info("no system metrics of this node: %s", error)

    def stop(self) -> None:
        """Stop measuring; idempotent, not a collective."""
        if self._watch is not None:
            self._watch.stop()

    def gpu_use(self) -> float | None:
        """Last measured utilization of this node's GPUs in percent, their mean; None if it is not measured."""
        return None if self._watch is None else self._watch.gpu_use

    def finish(self) -> None:
        """Stop measuring on every node and record what all nodes have written; a collective."""
        self.stop()
        gather_objects(None, self._world)
        if self._world.is_main:
            self._collect()

    def _collect(self) -> None:
        self._others.collect(self._tracker.metrics)


def _do_nothing() -> None:
    return None


def _gpu_ids(world: World) -> list[str]:
    """UUIDs of the GPUs that the ranks of this node use."""
    if world.device.type != "cuda":
        return []
    return [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(world.local_size)]
