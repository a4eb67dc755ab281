"""What a run says of itself when an attempt begins: configuration, code, environment, data, nodes."""

from __future__ import annotations

import json
import logging
import os
import socket
from typing import Any

import torch

from dl2pa import envvars
from dl2pa.config import Config, dump_config, fingerprint, flatten
from dl2pa.config.identity import group_name, run_title
from dl2pa.osutil import read_json, write_atomically, write_json
from dl2pa.redaction import redact
from dl2pa.rundir import RunDirectory
from dl2pa.tracking import Tracker, choose_uri
from dl2pa.tracking.nodes import NodeFile, NodeWatch, OtherNodes
from dl2pa.training.data import DataSplits, class_counts
from dl2pa.training.describe import NOTE_TAG, describe_run
from dl2pa.training.distributed import World, from_rank_zero, gather_objects
from dl2pa.training.environment import bitwise_differences, describe_environment, write_code
from pipelines.build import Dataset, num_samples

log = logging.getLogger(__name__)


def start_tracker(
    config: Config, world: World, run: RunDirectory, data: DataSplits, attempt: int, name: str
) -> Tracker:
    """Write configuration, environment and code to the run directory, and begin to track; a collective."""
    hosts = gather_objects(os.environ.get(envvars.NODE_NAME) or socket.gethostname(), world)
    environment = describe_environment(world, hosts)
    tracker = Tracker(
        run.root,
        enabled=config.tracking.enabled and world.is_main,
        uri=choose_uri(config.tracking.uri, run.root.parent),
        experiment=config.tracking.experiment,
        run_name=config.tracking.run_name or run_title(config, name),
        attempt=attempt,
    )
    if not world.is_main:
        return tracker
    earlier = read_json(run.environment).get("attempts", [])
    if earlier:
        changed = bitwise_differences(earlier[-1], environment)
        if changed:
            log.warning(
                "not bit for bit what the earlier attempt would have computed: %s", "; ".join(changed)
            )
    attempts = [*earlier, {"attempt": attempt, "data_fingerprint": data.fingerprint, **environment}]
    write_json(run.environment, {"attempts": attempts}, indent=1)
    write_atomically(run.config, dump_config(config, redacted=True))
    tracker.start(
        {**flatten(config), "num_classes": len(data.classes)}, _tags(config, data, environment, name)
    )
    tracker.inputs([_described(config, data.train, "training"), _described(config, data.val, "validation")])
    for path in (run.config, run.environment):
        tracker.artifact(path)
    if tracker.enabled:
        for path in write_code(run.root / "code", attempt):
            tracker.artifact(path, "code")
    return tracker


def _tags(config: Config, data: DataSplits, environment: dict[str, Any], name: str) -> dict[str, str]:
    """What makes a run findable."""
    commit = environment["git_commit"]
    return {
        "recipe": name,
        "group": group_name(config),
        NOTE_TAG: describe_run(config, name, environment["command"]),
        "method": config.method.name,
        "loss": config.loss,
        "assignment": config.assignment,
        "backbone": config.model.backbone,
        "dataset": config.data.dataset,
        "imbalance": "none" if config.data.imbalance is None else f"{config.data.imbalance:g}",
        "num_classes": str(len(data.classes)),
        "dim": str(config.model.embedding_dim),
        "seed": str(config.train.seed),
        "precision": config.train.precision,
        "dl2pa.data": data.fingerprint,
        "dl2pa.fingerprint": fingerprint(config),
        "dl2pa.world_size": str(environment["world_size"]),
        "mlflow.source.name": f"dl2pa train {name}",
        "mlflow.source.type": "LOCAL",
        **({"mlflow.source.git.commit": commit} if commit else {}),
        **{f"env.{k}": str(v) for k, v in environment.items() if v is not None},
        **{k: redact(v) for k, v in config.tracking.tags.items()},
    }


def _described(config: Config, dataset: Dataset, context: str) -> dict[str, str]:
    """A data set as MLflow shows it; its digest changes with any file, label or pixel."""
    data = config.data
    profile: dict[str, Any] = {"images": num_samples(dataset), "classes": len(dataset.classes)}
    counts = class_counts(dataset)
    if counts is not None:
        profile |= {"fewest_of_a_class": int(counts.min()), "most_of_a_class": int(counts.max())}
    if data.imbalance is not None and context == "training":
        profile["imbalance"] = data.imbalance
    where = getattr(dataset, "root", None) or data.root or data.dataset
    return {
        "name": f"{data.dataset} {context}",
        "digest": dataset.fingerprint[:36],
        "context": context,
        "source": json.dumps({"uri": str(where)}),
        "profile": json.dumps(profile),
    }


class Nodes:
    """Measures every node of the run, each by its first rank; all ranks make one.

    Args:
        tracker: rank 0's takes the points.
    """

    def __init__(
        self, config: Config, world: World, run: RunDirectory, tracker: Tracker, attempt: int
    ) -> None:
        self._world = world
        self._tracker = tracker
        self._others = OtherNodes(run.root)
        self._watch: NodeWatch | None = None
        created: int | None = from_rank_zero(tracker.created, world)
        every = config.tracking.system_every_s
        if created is None or not every or world.local_rank != 0:
            return
        node = int(os.environ.get("GROUP_RANK", world.rank // max(1, world.local_size)))
        write = tracker.metrics if world.is_main else NodeFile(run.root, node, attempt).write
        also = self._collect if world.is_main and world.size > world.local_size else _nothing
        try:
            self._watch = NodeWatch(node, write, created, every, _gpus(world), run.root, also)
            self._watch.start()
        except Exception as error:  # no psutil, or a machine that it does not know
            log.info("the node is not measured: %s", error)

    def stop(self) -> None:
        """End the measuring; idempotent, no collective."""
        if self._watch is not None:
            self._watch.stop()

    def finish(self) -> None:
        """End the measuring on every node and take over what all have left; a collective."""
        self.stop()
        gather_objects(None, self._world)
        if self._world.is_main:
            self._collect()

    def _collect(self) -> None:
        self._others.collect(self._tracker.metrics)


def _nothing() -> None:
    return None


def _gpus(world: World) -> list[str]:
    """UUIDs of the GPUs that the ranks of this node use."""
    if world.device.type != "cuda":
        return []
    return [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(world.local_size)]
