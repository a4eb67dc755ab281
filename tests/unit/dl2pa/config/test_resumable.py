from __future__ import annotations

from typing import Any

import pytest

from dl2pa.config import Config, merge, parse_config
from dl2pa.config.identity import check_resumable, checkpoint_identity
from dl2pa.errors import UserError

BASE: dict[str, Any] = {
    "data": {"dataset": "cifar100", "root": "/a", "crop": "pad"},
    "model": {"backbone": "resnet32", "embedding_dim": 50},
}


def identity(change: dict[str, Any], fingerprint: str = "same") -> dict[str, Any]:
    return {**checkpoint_identity(parse_config(merge(BASE, change))), "data.fingerprint": fingerprint}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"data": {"root": "/b"}},
        {"launch": {"nproc": 4, "device": "cpu"}},
        {"tracking": {"uri": "http://x", "tags": {"a": "b"}}},
        {"checkpoint": {"every_steps": 5, "keep": 1}},
    ],
)
def test_paths_and_launch_options_may_change_without_a_warning(
    change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    check_resumable(identity({}), identity(change))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"optim": {"lr": 0.1}}, "optim.lr"),
        ({"optim": {"weight_decay": 0.1}}, "optim.weight_decay"),
        ({"train": {"epochs": 5}}, "train.epochs"),
        ({"train": {"max_steps": 5}}, "train.max_steps"),
        ({"train": {"log_every_steps": 5}}, "train.log_every_steps"),
        ({"train": {"precision": "bf16"}}, "train.precision"),
        ({"train": {"accumulate": 4}}, "train.accumulate"),
        ({"train": {"checkpoint_activations": True}}, "train.checkpoint_activations"),
        ({"method": {"match": {"every_steps": 9}}}, "method.match.every_steps"),
    ],
)
def test_permitted_changes_are_logged(
    change: dict[str, Any], key: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_resumable(identity({}), identity(change))
    assert key in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"train": {"seed": 5}}, "train.seed"),
        ({"train": {"batch_size": 64}}, "train.batch_size"),
        ({"train": {"virtual_shards": 8}}, "train.virtual_shards"),
        ({"train": {"mixup": 0.2}}, "train.mixup"),
        ({"optim": {"name": "adamw"}}, "optim.name"),
        ({"model": {"embedding_dim": 51}}, "model.embedding_dim"),
        ({"model": {"backbone": "resnet20"}}, "model.backbone"),
        ({"method": {"name": "hpn"}}, "method.name"),
        ({"method": {"loss": "cross_entropy"}}, "method.loss"),
        ({"method": {"prototype_seed": 3}}, "method.prototype_seed"),
        ({"data": {"dataset": "cifar10"}}, "data.dataset"),
        ({"data": {"flip": 0.0}}, "data.flip"),
        ({"data": {"imbalance": 0.01}}, "data.imbalance"),
    ],
)
def test_other_changes_are_refused_with_both_values(change: dict[str, Any], key: str) -> None:
    section, name = key.split(".")
    with pytest.raises(UserError) as caught:
        check_resumable(identity({}), identity(change))
    assert caught.value.field == key
    assert caught.value.value == change[section][name]
    default = getattr(getattr(Config(), section), name)
    assert repr(BASE.get(section, {}).get(name, default)) in caught.value.message
    assert "--run-dir" in caught.value.remedy


@pytest.mark.parametrize(
    ("key", "value"), [("warmup_epochs", 2), ("statistic", "pooled")], ids=["warm-up", "statistic"]
)
def test_changes_of_the_assignment_updates_that_need_another_state_are_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match="this run was started with") as caught:
        check_resumable(identity({}), identity({"method": {"match": {key: value}}}))
    assert (caught.value.field, caught.value.value) == (f"method.match.{key}", value)


def test_other_images_are_refused() -> None:
    with pytest.raises(UserError, match="images differ") as caught:
        check_resumable(identity({}), identity({}, fingerprint="other"))
    assert caught.value.field == "data.root"


def test_the_key_that_changed_the_images_is_named() -> None:
    with pytest.raises(UserError) as caught:
        check_resumable(identity({}), identity({"data": {"imbalance": 0.01}}, fingerprint="other"))
    assert (caught.value.field, caught.value.value) == ("data.imbalance", 0.01)


def test_a_key_missing_in_the_checkpoint_had_its_default() -> None:
    before = identity({})
    del before["train.seed"]
    check_resumable(before, identity({}))
    with pytest.raises(UserError, match=r"train.seed ?= ?1: this run was started with 0"):
        check_resumable(before, identity({"train": {"seed": 1}}))


def test_a_removed_key_is_named() -> None:
    with pytest.raises(UserError) as caught:
        check_resumable({**identity({}), "train.magic": 3}, identity({}))
    assert caught.value.field == "train.magic"


def test_former_key_names_of_an_old_checkpoint_are_translated(caplog: pytest.LogCaptureFixture) -> None:
    before = identity({"train": {"log_every_steps": 7, "eval_every_epochs": 3}})
    before["train.log_every"] = before.pop("train.log_every_steps")
    before["train.eval_every"] = before.pop("train.eval_every_epochs")
    before["method.match.lag_steps"] = 0
    check_resumable(before, identity({"train": {"log_every_steps": 7, "eval_every_epochs": 3}}))
    assert caplog.text == ""
    check_resumable(before, identity({"train": {"log_every_steps": 7, "eval_every_epochs": 4}}))
    assert "train.eval_every_epochs changed from 3 to 4" in caplog.text
