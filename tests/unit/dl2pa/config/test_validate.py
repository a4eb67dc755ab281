from __future__ import annotations

import pytest

from dl2pa.config import parse_config
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


def test_cuda_graphs_are_refused_for_several_processes() -> None:
    graphs = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"compile": "graphs"})})
    validate(graphs, 1)
    with pytest.raises(UserError, match=r"train\.compile"):
        validate(graphs, 2)


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
