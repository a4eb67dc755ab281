from __future__ import annotations

from typing import Any

import pytest

from dl2pa.config import Config, parse_config
from dl2pa.config.validate import DataSizes, validate
from dl2pa.errors import UserError

CONFIG = parse_config(
    {
        "data": {"dataset": "cifar10", "crop": "pad", "image_size": 32},
        "train": {"batch_size": 48},
        "model": {"backbone": "resnet32", "embedding_dim": 9},
    }
)
DATA = DataSizes(num_train=100, num_val=10, num_classes=10, image_size=32)


def test_a_valid_configuration_is_accepted() -> None:
    validate(CONFIG, 4)
    validate(CONFIG, 4, DATA)
    validate(CONFIG, 4, DataSizes(100, 10, 10))


def test_patience_without_validation_images_is_refused() -> None:
    patient = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"patience": 3})})
    validate(patient, 4, DATA)
    with pytest.raises(UserError, match=r"data\.val_root"):
        validate(patient, 4, DataSizes(100, 0, 10, 32))


def test_a_contradictory_recipe_is_refused_before_the_data_is_opened() -> None:
    train = CONFIG.train.model_copy(update={"patience": 3, "eval_every_epochs": 4})
    with pytest.raises(UserError, match=r"train\.patience"):
        validate(CONFIG.model_copy(update={"train": train}), 4)


def test_cuda_graphs_are_refused_for_several_processes() -> None:
    graphs = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"compile": "graphs"})})
    validate(graphs, 1)
    with pytest.raises(UserError, match=r"train\.compile"):
        validate(graphs, 2)


def with_train(**values: Any) -> Config:
    return CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update=values)})


def test_micro_batches_consist_of_complete_virtual_shards() -> None:
    """12 virtual shards of 4 images."""
    validate(with_train(accumulate=6), 2)
    validate(with_train(accumulate="auto"), 4)
    with pytest.raises(UserError, match=r"train\.accumulate=4.*among \[1, 2, 3, 6\]"):
        validate(with_train(accumulate=4), 2)
    validate(with_train(accumulate=4, virtual_shards=24), 2)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"accumulate": 2, "compile": "graphs"}, "train.accumulate"),
        ({"accumulate": "auto", "compile": "graphs"}, "train.accumulate"),
        ({"accumulate": "auto", "sync_bn": True}, "train.accumulate"),
        ({"checkpoint_activations": True, "compile": True}, "train.checkpoint_activations"),
        ({"checkpoint_activations": True, "sync_bn": True}, "train.checkpoint_activations"),
    ],
)
def test_combinations_that_cannot_save_memory_are_refused(values: dict[str, Any], field: str) -> None:
    world_size = 1 if "compile" in values else 2
    with pytest.raises(UserError) as caught:
        validate(with_train(**values), world_size)
    assert caught.value.field == field


def test_optimizers_of_timm_need_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.model_copy(update={"optim": CONFIG.optim.model_copy(update={"name": "lars"})})
    monkeypatch.setattr("dl2pa.zoo.is_installed", lambda _library: True)
    validate(config, 1)
    monkeypatch.setattr("dl2pa.zoo.is_installed", lambda _library: False)
    with pytest.raises(UserError, match=r"optim\.name"):
        validate(config, 1)


@pytest.mark.parametrize(
    ("world_size", "data", "field"),
    [
        (5, None, "launch.nproc"),
        (5, DataSizes(0, 0, 0, 0), "launch.nproc"),
        (4, DataSizes(0, 0, 0, 0), "data.val_root"),
        (4, DataSizes(47, 10, 1, 28), "train.batch_size"),
        (4, DataSizes(48, 10, 1, 28), "data.num_classes"),
        (4, DataSizes(48, 10, 10, 28), "data.image_size"),
    ],
)
def test_the_first_invalid_field_is_named(world_size: int, data: DataSizes | None, field: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(CONFIG, world_size, data)
    assert caught.value.field == field
