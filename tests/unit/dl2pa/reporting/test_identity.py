from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dl2pa.config import Config
from dl2pa.config.identity import describe, relative_length, run_identity

ConfigWith = Callable[..., Config]


@pytest.mark.parametrize(
    "changes",
    [
        {"train.seed": 7},
        {"tracking.experiment": "other", "tracking.tags": {"sweep": "s"}, "launch.nproc": 2},
        {"checkpoint.every_steps": 5, "data.root": "/elsewhere", "data.threads": 3},
        {"train.log_every_steps": 1, "train.eval_batch_size": 64, "train.compile": True},
        {"train.deterministic": False, "train.channels_last": True},
        {"method.loss": "squared_cosine", "method.assignment": "dynamic", "data.loader": "synthetic"},
        {"train.virtual_shards": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_without_effect_on_results_keep_the_recipe(
    changes: dict[str, Any], config_with: ConfigWith
) -> None:
    assert run_identity(config_with(changes)) == run_identity(config_with())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", 0.2),
        ("optim.nesterov", True),
        ("model.embedding_dim", 5),
        ("model.widths", [8, 16, 32]),
        ("method.name", "hpn"),
        ("method.assignment", "static"),
        ("method.match.every_steps", 9),
        ("method.prototype_seed", 1),
        ("train.batch_size", 16),
        ("train.precision", "bf16"),
        ("train.sync_bn", True),
        ("train.eval_every_epochs", 2),
        ("train.epochs", 21),
        ("train.max_steps", 30),
        ("data.synthetic_samples", [801, 200]),
        ("data.flip", 0.0),
    ],
)
def test_settings_with_effect_on_results_change_the_recipe(
    key: str, value: Any, config_with: ConfigWith
) -> None:
    assert run_identity(config_with({key: value})) != run_identity(config_with())


@pytest.mark.parametrize(
    ("changes", "epochs_done", "expected"),
    [
        ({}, 20, "full"),
        ({"train.max_steps": 30}, 0, "short"),
        ({"train.epochs": 5}, 5, "short"),
        ({"train.epochs": 5, "optim.milestones": [2, 3]}, 5, "short"),
        ({"train.epochs": 5, "optim.milestones": [2]}, 5, None),
        ({"train.epochs": 5, "optim.milestones": [2, 3], "optim.warmup_epochs": 1}, 5, None),
        ({"train.epochs": 5, "optim.lr": 0.2}, 5, None),
        ({"train.epochs": 30}, 30, "other"),
        ({"train.epochs": 30, "train.max_steps": 2000}, 20, "other"),
        ({"train.epochs": 30, "optim.milestones": [15, 25]}, 30, None),
        ({"optim.milestones": [9, 15]}, 20, None),
        ({"optim.lr": 0.2}, 20, None),
        ({"method.class_vectors": "vectors.npy"}, 20, None),
    ],
)
def test_length_relative_to_a_cell(
    changes: dict[str, Any], epochs_done: int, expected: str | None, config_with: ConfigWith
) -> None:
    cell, run = run_identity(config_with()), run_identity(config_with(changes))
    assert relative_length(run, epochs_done, cell, ()) == expected


def test_a_shorter_warm_up_is_a_shorter_schedule(config_with: ConfigWith) -> None:
    cell = run_identity(config_with({"optim.warmup_epochs": 4}))
    for warmup, expected in ((1, "short"), (0, None)):
        run = run_identity(config_with({"train.epochs": 5, "optim.warmup_epochs": warmup}))
        assert relative_length(run, 5, cell, ()) == expected


def test_required_keys_of_a_cell_may_differ(config_with: ConfigWith) -> None:
    run = run_identity(config_with({"method.class_vectors": "vectors.npy"}))
    assert relative_length(run, 20, run_identity(config_with()), ("method.class_vectors",)) == "full"


def test_description_of_a_recipe(config_with: ConfigWith) -> None:
    text = describe(run_identity(config_with()))
    assert text == "squared_cosine, dynamic; sgd 0.1, decay 2e-05, ×0.1 after 10, 15; 20 epochs, batch 8"
    changes = {
        "method": {"loss": "cross_entropy", "scale": 14, "label_smoothing": 0.1, "prototypes": "hpn"},
        "optim": {"schedule": "cosine", "warmup_epochs": 2},
        "train": {"mixup": 0.2, "precision": "bf16"},
    }
    rich = describe(run_identity(config_with(changes)))
    for words in ("cross_entropy at scale 14, smoothing 0.1", "prototypes hpn", "warm-up 2, cosine"):
        assert words in rich
    assert rich.endswith("mixup 0.2, bf16")
    linear = {"method.name": "psc", "method.normalize": False}
    assert describe(run_identity(config_with(linear))).startswith("cross_entropy (linear), static")
    assert describe(run_identity(config_with({"method.name": "dnc"}))).startswith("cross_entropy, static")


def test_descriptions_of_several_recipes_differ(config_with: ConfigWith) -> None:
    plain = run_identity(config_with())
    other = run_identity(config_with({"model.widths": [8, 16, 32], "train.sync_bn": True, "optim.lr": 0.2}))
    assert describe(plain, among=[plain]) == describe(plain)
    assert describe(plain, among=[plain, other]).endswith("model.widths=[16, 32, 64], train.sync_bn=false")
    assert describe(other, among=[plain, other]).endswith("model.widths=[8, 16, 32], train.sync_bn=true")
