from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dl2pa.config import Config, dump_config, parse_config
from dl2pa.model.inference import load_classifier
from dl2pa.model.model import build_model
from dl2pa.rundir import RunDirectory
from dl2pa.training.checkpoint import CheckpointStore
from dl2pa.training.distributed import World
from dl2pa.training.progress import Progress
from dl2pa.training.train_state import TrainState
from dl2pa.training.weights import model_file
from pipelines.sampler import TrainSampler
from pipelines.synthetic import SyntheticPipeline
from support.commands import process_state_restored


def config(ema: float, **method: Any) -> Config:
    return parse_config(
        {
            "data": {"dataset": "synthetic", "num_classes": 5, "image_size": 8},
            "model": {"backbone": "resnet8", "embedding_dim": 3, "widths": [4, 4, 4]},
            "optim": {"lr": 0.1, "schedule": "constant"},
            "method": method,
            "train": {"batch_size": 8, "ema": ema},
            "launch": {"device": "cpu", "threads": 1},
        }
    )


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_a_checkpoint_of_an_unfinished_validation_has_its_class_vectors(
    phase: str, alone: World, tmp_path: Path
) -> None:
    """The validation after the warm-up is that of the prototypes."""
    settings = config(0.0, match={"warmup_epochs": 1})
    train_state = TrainState(settings, build_model(settings, 5), alone, 4)
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.config.write_text(dump_config(settings))
    store = CheckpointStore(run.checkpoints, 1, True)
    progress = Progress(epoch=0, step=4, global_step=4, phase=phase)
    store.save(4, {**train_state.state(), "progress": progress.as_dict()}, wait=True)
    store.close()
    with process_state_restored():
        written = load_file(model_file(run.root, settings, "latest"))
    train_state.begin_epoch(0 if phase == "train" else 1)
    assert torch.equal(written["class_vectors"], train_state.model.method.class_vectors())


def test_a_checkpoint_has_the_preprocessing_of_its_run(alone: World, tmp_path: Path) -> None:
    """Also if an evaluation sets another image size."""
    settings = config(0.0)
    train_state = TrainState(settings, build_model(settings, 5), alone, 4)
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.config.write_text(dump_config(settings))
    store = CheckpointStore(run.checkpoints, 1, True)
    store.save(4, {**train_state.state(), "progress": Progress(epoch=1).as_dict()}, wait=True)
    store.close()
    larger = settings.model_copy(update={"data": settings.data.model_copy(update={"image_size": 16})})
    with process_state_restored():
        classifier = load_classifier(model_file(run.root, larger, "latest"))
    assert classifier.description["preprocessing"]["image_size"] == 8


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_checkpoint_gives_the_averaged_weights(ema: float, alone: World, tmp_path: Path) -> None:
    settings = config(ema)
    train_state = TrainState(settings, build_model(settings, 5), alone, 4)
    train_state.wrap()
    train_state.begin_epoch(0)
    train_state.model.train()
    for step, batch in enumerate(SyntheticPipeline(5, 8, TrainSampler(32, 8, 0), 0, torch.device("cpu"))):
        train_state.step(batch, step)
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.config.write_text(dump_config(settings))
    store = CheckpointStore(run.checkpoints, 1, True)
    store.start()
    progress = Progress(epoch=1, global_step=4)
    store.save(4, {**train_state.state(), "progress": progress.as_dict()}, best=True, wait=True)
    store.close()
    with process_state_restored():
        written = load_file(model_file(run.root, settings, "best"))
    trained = dict(train_state.model.named_parameters())
    for name, parameter in train_state.evaluated.named_parameters():
        assert torch.equal(written[name], parameter), name
        assert torch.equal(written[name], trained[name]) == (not ema), name
