"""What would end a training, found before any of several is begun."""

from __future__ import annotations

import json
from collections.abc import Iterable

from dl2pa.config import Config
from dl2pa.config.validate import validate


def check_trainings(trainings: Iterable[tuple[Config, int]]) -> None:
    """Check each configuration against its data, which is opened once where several share it.

    Args:
        trainings: configurations, each with its number of processes in all.

    Raises:
        UserError: naming the field at fault.
    """
    from dl2pa.model.model import check_prototypes
    from dl2pa.training.data import open_data, sizes_of

    seen: set[str] = set()
    data, opened = None, ""
    for config, world_size in sorted(trainings, key=lambda pair: pair[0].data.model_dump_json()):
        tree = config.model_dump(mode="json")
        tree["tracking"], tree["train"]["seed"] = None, None
        key = json.dumps([tree, world_size], sort_keys=True)
        if key in seen:
            continue
        seen.add(key)
        if data is None or opened != config.data.model_dump_json():
            data, opened = open_data(config, world_size), config.data.model_dump_json()
        else:
            validate(config, world_size, sizes_of(data))
        check_prototypes(config, len(data.classes))
