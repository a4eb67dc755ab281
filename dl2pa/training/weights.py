"""Weights of an existing run, from its model file or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dl2pa.config import Config
from dl2pa.config.identity import data_identity
from dl2pa.errors import UserError
from dl2pa.model.inference import Classifier, load_classifier
from dl2pa.model.model import build_model, prototypes_of_checkpoint
from dl2pa.model.saved import save_classifier
from dl2pa.model.weight_sources import PREPROCESSING_KEYS
from dl2pa.recorded_run import check_weights, load_run_config, no_checkpoint
from dl2pa.rundir import RunDirectory
from dl2pa.training.checkpoint import CheckpointStore
from dl2pa.training.data import groups_of, open_split
from dl2pa.training.distributed import World
from dl2pa.training.progress import Progress
from dl2pa.training.train_state import TrainState


def load_weights(path: Path, config: Config, which: str) -> Classifier:
    """Load a run's model: `final`, or from the `latest` or `best` checkpoint."""
    return load_classifier(model_file(path, config, which))


def model_file(path: Path, config: Config, which: str) -> Path:
    """Return the run's `final` model file, or write one from its `latest` or `best` checkpoint.

    Args:
        config: of the run; its data may be at another place.

    Raises:
        UserError: the run has no such weights, or the data has other classes.
    """
    check_weights(path, which)
    run = RunDirectory(path)
    if which == "final":
        return run.model
    store = CheckpointStore(run.checkpoints, config.checkpoint.keep, config.checkpoint.keep_best)
    state = store.load(which)
    if state is None:
        raise no_checkpoint(path)
    train = open_split(config, "train")
    classes = tuple(train.classes)
    _check_classes(state, config, classes)
    config = _with_recorded_preprocessing(config, run)
    model = build_model(config, len(classes), prototypes_of_checkpoint(state))
    train_state = TrainState(config, model, World(0, 1, 0, 1, torch.device("cpu"), 1), 1)
    train_state.load(state)
    progress = Progress(**state["progress"])
    # The same epoch as the validation at this step uses, also where `train.max_steps` ended inside an epoch, and if the
    # run was stopped in the validation.
    is_over = progress.phase == "evaluate" or (progress.step > 0 and progress.validated)
    train_state.begin_epoch(progress.epoch + is_over)
    target = run.checkpoint_model(which)
    save_classifier(target, train_state.evaluated, config, classes, groups_of(config, train))
    return target


def _with_recorded_preprocessing(config: Config, run: RunDirectory) -> Config:
    """Configuration with the preprocessing of the run, which overrides for an evaluation do not change."""
    recorded = load_run_config(run.root, ()).data
    kept = {key: getattr(recorded, key) for key in (*PREPROCESSING_KEYS, "loader")}
    return config.model_copy(update={"data": config.data.model_copy(update=kept)})


def _check_classes(state: Mapping[str, Any], config: Config, classes: tuple[str, ...]) -> None:
    """Refuse data with other classes than those of a checkpoint, which does not contain their names."""
    known = state.get("identity", {}).get("data.classes")  # early checkpoints do not have it
    if known is not None and known != data_identity("", classes)["data.classes"]:
        message, folder = "has other classes than the model was trained on", config.data.root
        remedy = "Give a data set with the classes of the model, or set data.classes."
        raise UserError("data.root", folder, message, remedy)
