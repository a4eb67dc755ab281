"""A run as it lies on disk: its configuration and its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dl2pa.config import Config, load_config
from dl2pa.errors import UserError
from dl2pa.methods import PrototypeMethod
from dl2pa.model.inference import Classifier, load_classifier, tensors_of
from dl2pa.model.model import Model, build_model, prototypes_of_checkpoint
from dl2pa.osutil import follow_umask
from dl2pa.rundir import RunDirectory
from dl2pa.training.checkpoint import CheckpointStore
from dl2pa.training.data import groups_of, open_split
from dl2pa.training.distributed import join_world
from dl2pa.training.progress import Progress
from dl2pa.training.train_state import TrainState
from pipelines.longtail import Group

_FORMAT = "dl2pa-model-1"


def load_run_config(path: Path, overrides: Sequence[str]) -> Config:
    """The resolved configuration of a run.

    Raises:
        UserError: the folder is not a run directory.
    """
    run = RunDirectory(path)
    if not run.config.is_file():
        raise UserError("run", str(path), "is not a run directory", "Give the folder `dl2pa train` wrote.")
    return load_config(run.config, overrides)


def load_weights(path: Path, config: Config, which: str) -> Classifier:
    """Model of a run: `final`, or from the `latest` or `best` checkpoint."""
    return load_classifier(model_file(path, config, which))


def model_file(path: Path, config: Config, which: str) -> Path:
    """File of the wanted weights; from a checkpoint it is written beside it.

    Raises:
        UserError: the run has no such weights.
    """
    run = RunDirectory(path)
    if which == "final":
        if not run.model.is_file():
            raise UserError(
                "run",
                str(path),
                "is not finished",
                "Use --checkpoint latest, or let `dl2pa train` finish it.",
            )
        return run.model
    store = CheckpointStore(run.checkpoints, config.checkpoint.keep, config.checkpoint.keep_best)
    state = store.load(which)
    if state is None:
        raise UserError("run", str(path), "has no checkpoint yet", "Train it first.")
    train = open_split(config, "train")
    classes = tuple(train.classes)
    train_state = TrainState(
        config, build_model(config, len(classes), prototypes_of_checkpoint(state)), join_world(config), 1
    )
    train_state.load(state)
    at = Progress(**state["progress"])
    cut_short = at.step > 0 and bool(at.history) and at.history[-1]["step"] == at.global_step
    train_state.begin_epoch(at.epoch + cut_short)  # as the validation at this step did
    target = path / f"model-{which}.safetensors"
    save_classifier(target, train_state.evaluated, config, classes, groups_of(config, train))
    return target


@torch.no_grad()
def save_classifier(
    path: Path,
    model: Model,
    config: Config,
    classes: tuple[str, ...],
    groups: tuple[Group, ...] | None = None,
) -> None:
    """Write weights, class vectors, P, σ, class names and preprocessing to one safetensors file, atomically.

    The bytes depend on nothing but those: no time, no path.
    """
    from safetensors.torch import save_file

    method = model.method
    tensors = {f"embedder.{k}": v for k, v in model.embedder.state_dict().items()}
    head = method.head()
    tensors |= tensors_of(head)
    if isinstance(method, PrototypeMethod):
        tensors |= {"prototypes": method.prototypes, "assignment": method.assignment}
    description = {
        "format": _FORMAT,
        "classes": list(classes),
        "scale": float(head.scale),
        "normalize": head.normalize,
        "vectors_per_class": head.per_class,
        "method": config.method.name,
        "model": config.model.model_dump(mode="json"),
        "preprocessing": _preprocessing(config),
        "groups": None if groups is None else list(groups),
    }
    aside = path.with_name(f".{path.name}.aside")
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(contiguous, aside, metadata={"dl2pa": json.dumps(description, sort_keys=True)})
    follow_umask(aside)
    aside.replace(path)


def _preprocessing(config: Config) -> dict[str, Any]:
    resident = config.loader in ("resident", "synthetic")
    return {
        "resize_shorter_side": config.data.image_size if resident else config.data.eval_resize,
        "image_size": config.data.image_size,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
    }
