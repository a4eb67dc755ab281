from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

from dl2pa.config import (
    Config,
    dump_config,
    fingerprint,
    flatten,
    load_config,
    load_recorded_config,
    merge,
    parse_config,
)
from dl2pa.config.checks import check_loader, check_method
from dl2pa.config.load import RENAMED_KEYS
from dl2pa.config.sweep import load_sweep
from dl2pa.config.warnings import warnings
from dl2pa.errors import UserError

ROOT = Path(__file__).resolve().parents[4]
NOT_CONFIGS = {"_base", "searches", "sweeps", "published.yaml"}
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if not NOT_CONFIGS & set(p.parts))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def nested(key: str, value: Any) -> dict[str, Any]:
    """Tree with one value at a dotted key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def refused(call: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.message
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_configuration_is_valid_and_has_a_header(
    path: Path, load_shipped: Callable[..., tuple[Config, bool]]
) -> None:
    overrides = ["method.class_vectors=vectors.npy"] if "word2vec" in path.name else []
    config, method_exists = load_shipped(path, overrides)
    check_loader(config)
    if method_exists:
        check_method(config, config.data.num_classes or 10)
        unexpected = [s for s in warnings(config, config.data.num_classes or 10) if "isometry" not in s]
        assert unexpected == []
    header = "".join(takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines(True)))
    assert "measured" in header
    assert re.search(r"published|Expected", header, re.IGNORECASE)


def test_there_are_shipped_configurations() -> None:
    assert (ROOT / "configs/quickstart.yaml") in CONFIGS


def test_bases_are_merged_in_order_and_the_file_takes_precedence(write: Callable[[str, str], Path]) -> None:
    write("_base/one.yaml", "train: {epochs: 1, batch_size: 8}\noptim: {lr: 0.1}")
    write("_base/two.yaml", "base: one.yaml\ntrain: {epochs: 2}\nmethod: {match: {every_steps: 7}}")
    write("other.yaml", "optim: {lr: 0.3}\ndata: {mean: [0.1, 0.2, 0.3]}")
    top = write(
        "top.yaml", "base: [_base/two.yaml, other.yaml]\nmethod: {match: {every_epochs: 0}}\ndata: {flip: 0}"
    )
    config = load_config(top)
    assert (config.train.epochs, config.train.batch_size, config.optim.lr) == (2, 8, 0.3)
    assert (config.method.match.every_steps, config.method.match.every_epochs) == (7, 0)
    assert config.data.mean == (0.1, 0.2, 0.3)


def test_a_base_may_be_used_twice_but_not_by_itself(write: Callable[[str, str], Path]) -> None:
    write("root.yaml", "train: {epochs: 3}")
    write("left.yaml", "base: root.yaml")
    write("right.yaml", "base: root.yaml")
    assert load_config(write("diamond.yaml", "base: [left.yaml, right.yaml]")).train.epochs == 3
    write("a.yaml", "base: b.yaml")
    error = refused(lambda: load_config(write("b.yaml", "base: a.yaml")))
    assert error.field == "base"
    assert "itself" in error.message


def test_a_missing_base_is_named(write: Callable[[str, str], Path]) -> None:
    error = refused(lambda: load_config(write("a.yaml", "base: gone.yaml")))
    assert "gone.yaml" in str(error.value)


@pytest.mark.parametrize("base", ["3", "{a: b}", "[[x.yaml]]"])
def test_a_base_that_is_not_a_file_name_is_refused(write: Callable[[str, str], Path], base: str) -> None:
    assert refused(lambda: load_config(write("a.yaml", f"base: {base}"))).field == "base"


def test_an_empty_file_or_section_means_the_defaults(write: Callable[[str, str], Path]) -> None:
    assert load_config(write("a.yaml", "")) == Config()
    assert load_config(write("b.yaml", "base:\ntrain: {}")) == Config()


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("train.epochs=5", lambda c: c.train.epochs, 5),
        ("optim.weight_decay=1e-4", lambda c: c.optim.weight_decay, 1e-4),
        ("method.match.every_steps=20", lambda c: c.method.match.every_steps, 20),
        ("model.widths=[32, 64, 128]", lambda c: c.model.widths, (32, 64, 128)),
        ("tracking.uri=http://host:5000/?a=b", lambda c: c.tracking.uri, "http://host:5000/?a=b"),
        ("data.root=/data/my images; old", lambda c: c.data.root, "/data/my images; old"),
        ("train.max_steps=", lambda c: c.train.max_steps, None),
        ("tracking.tags={team: vision}", lambda c: c.tracking.tags, {"team": "vision"}),
        ("optim={lr: 0.25, name: adamw}", lambda c: (c.optim.lr, c.optim.name), (0.25, "adamw")),
    ],
)
def test_an_override_replaces_one_value(
    write: Callable[[str, str], Path], override: str, read: Callable[[Config], Any], expected: Any
) -> None:
    path = write("a.yaml", "train: {epochs: 2, max_steps: 9}\nmethod: {match: {every_epochs: 3}}")
    config = load_config(path, [override])
    assert read(config) == expected
    assert config.method.match.every_epochs == 3
    assert load_config(path, ["train.epochs=7", override, "train.batch_size=4"]).train.batch_size == 4


def test_the_last_of_two_overrides_wins(write: Callable[[str, str], Path]) -> None:
    assert load_config(write("a.yaml", ""), ["train.epochs=5", "train.epochs=6"]).train.epochs == 6


@pytest.mark.parametrize("text", ["train.epochs", "=5", "train..epochs=5", ".train=1", "train.=1"])
def test_a_malformed_override_is_refused(write: Callable[[str, str], Path], text: str) -> None:
    error = refused(lambda: load_config(write("a.yaml", ""), [text]))
    assert error.field == "override"
    assert error.value == text


@pytest.mark.parametrize(
    ("tree", "field", "nearest"),
    [
        ({"trian": {"epochs": 1}}, "trian", "train"),
        ({"train": {"epoch": 1}}, "train.epoch", "train.epochs"),
        ({"method": {"match": {"every_step": 1}}}, "method.match.every_step", "method.match.every_steps"),
        ({"model": {"embeding_dim": 3}}, "model.embeding_dim", "model.embedding_dim"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(
    tree: dict[str, Any], field: str, nearest: str
) -> None:
    error = refused(lambda: parse_config(tree))
    assert error.field == field
    assert error.remedy == f"Did you mean {nearest}?"


def test_an_unknown_key_without_near_names_lists_known_keys() -> None:
    error = refused(lambda: parse_config({"checkpoint": {"zzzz": 1}}))
    assert error.remedy == "Known: every_epochs, every_steps, keep, keep_best."


@pytest.mark.parametrize(("former", "current"), RENAMED_KEYS.items())
def test_a_renamed_key_is_refused_with_its_new_name(former: str, current: str) -> None:
    error = refused(lambda: parse_config(nested(former, 5)))
    assert (error.field, error.remedy) == (former, f"Use {current}.")
    assert flatten(parse_config(nested(current, 5)))[current] == 5


def test_a_removed_key_is_refused_with_a_remedy() -> None:
    error = refused(lambda: parse_config({"method": {"match": {"lag_steps": 9}}}))
    assert (error.field, error.message) == ("method.match.lag_steps", "the key was removed")


def test_a_recorded_configuration_may_use_former_names(write: Callable[[str, str], Path]) -> None:
    old = "train: {log_every: 7, eval_every: 3}\ndata: {slow_read_s: 9.0}\nmethod: {match: {lag_steps: 0}}\n"
    old += "model: {}\noptim: {}\n"
    path = write("run/config.yaml", old)
    config = load_recorded_config(path, ["train.eval_every_epochs=4"])
    assert (config.train.log_every_steps, config.train.eval_every_epochs) == (7, 4)
    assert config.data.read_warn_s == 9
    assert refused(lambda: load_config(path)).remedy == "Use data.read_warn_s."
    active = write("run/active.yaml", old.replace("lag_steps: 0", "lag_steps: 9"))
    assert refused(lambda: load_recorded_config(active)).field == "method.match.lag_steps"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.epochs", 0),
        ("train.epochs", "many"),
        ("train.batch_size", -8),
        ("train.precision", "fp8"),
        ("train.ema", 1.0),
        ("optim.lr", 0.0),
        ("optim.lr", float("nan")),
        ("optim.lr", float("inf")),
        ("optim.momentum", 1.0),
        ("optim.weight_decay", -1e-4),
        ("model.backbone", "resnet19"),
        ("model.embedding_dim", 0),
        ("method.name", "dlpa"),
        ("method.loss", "hinge"),
        ("method.match.momentum", 1.0),
        ("method.margin", -0.1),
        ("method.logit_adjustment", -1.0),
        ("method.scale", 0.0),
        ("method.sub_prototypes", 0),
        ("method.centroid_momentum", 1.0),
        ("data.flip", 1.5),
        ("data.num_classes", 1),
        ("data.imbalance", 0),
        ("data.imbalance", 1),
        ("data.imbalance", True),
        ("data.imbalance", "a lot"),
        ("data.root", 2024),
        ("data.mean", [0.5, 0.5]),
        ("data.std", [0.5, 0.0, 0.5]),
        ("launch.device", "tpu"),
        ("launch.nproc", 0),
        ("tracking.tags", "vision"),
    ],
)
def test_an_invalid_value_is_refused_with_its_field(field: str, value: Any) -> None:
    error = refused(lambda: parse_config(nested(field, value)))
    assert error.field.startswith(field)
    assert field in str(error)


def test_a_section_must_be_a_mapping() -> None:
    sections = ["data", "model", "method", "optim", "train", "checkpoint", "launch"]
    for section, value in itertools.product(sections, [None, 5, "text", [1]]):
        assert refused(lambda s=section, v=value: parse_config({s: v})).field == section


@pytest.mark.parametrize(
    "content",
    [b"train: [1, 2", b"train: {epochs: 1}}", b"\xff\xfe\x00", b"- a\n- b\n", b"just text", b"a: b: c"],
)
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    error = refused(lambda: load_config(path))
    assert error.field == "config"
    assert error.value == str(path)


def test_the_line_of_invalid_yaml_is_named(write: Callable[[str, str], Path]) -> None:
    error = refused(lambda: load_config(write("a.yaml", "train:\n  epochs: 1\n  lr: [1,\noptim: }")))
    assert "line 4" in error.message


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.yaml", tmp_path):
        assert "no such file" in refused(lambda p=path: load_config(p)).message


def test_a_dumped_configuration_reads_back_the_same(
    tmp_path: Path, load_shipped: Callable[..., tuple[Config, bool]]
) -> None:
    overrides = ["tracking.tags={a: b}", "optim.milestones=[3, 5]", "data.classes=[x, y]"]
    for path in CONFIGS:
        config, _ = load_shipped(path, overrides)
        written = tmp_path / "config.yaml"
        written.write_text(dump_config(config), encoding="utf-8")
        again = load_config(written)
        assert again == config, path
        assert fingerprint(again) == fingerprint(config), path


def test_keys_added_later_keep_the_names_of_earlier_runs() -> None:
    """The fingerprint of the defaults before these keys. Add a new key to `ADDED_KEYS` or `LOCAL_KEYS`."""
    assert fingerprint(Config()) == "bcde24470c"


def test_the_fingerprint_depends_on_the_recipe_not_on_paths() -> None:
    def changed(override: dict[str, Any]) -> str:
        return fingerprint(parse_config(merge({"train": {"seed": 1}}, override)))

    plain = changed({})
    assert len(plain) == 10
    assert int(plain, 16) >= 0
    for same in (
        {"launch": {"nproc": 4, "device": "cpu", "threads": 2}},
        {"tracking": {"enabled": False, "uri": "http://x", "tags": {"a": "b"}}},
        {"checkpoint": {"every_steps": 3, "keep": 9}},
        {"optim": {"momentum": 0.9}},
    ):
        assert changed(same) == plain, same
    others = [
        {"train": {"seed": 2}},
        {"optim": {"lr": 0.1}},
        {"model": {"embedding_dim": 10}},
        {"method": {"match": {"every_steps": 5}}},
        {"data": {"flip": 0.0}},
    ]
    assert len({plain, *map(changed, others)}) == len(others) + 1


def test_flattening_gives_dotted_keys_and_keeps_tags() -> None:
    flat = flatten(parse_config({"tracking": {"tags": {"a": "b"}}, "method": {"match": {"every_steps": 2}}}))
    assert flat["method.match.every_steps"] == 2
    assert flat["tracking.tags"] == {"a": "b"}
    assert not any(isinstance(v, dict) for k, v in flat.items() if k != "tracking.tags")


def test_the_default_data_folder_is_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DL2PA_DATA", "/data")
    assert parse_config({"data": {"dataset": "cifar100"}}).data.root == "/data"
    assert parse_config({"data": {"dataset": "cifar100", "root": ""}}).data.root in ("/data", None)
    assert parse_config({"data": {"dataset": "cifar100", "root": "/mine"}}).data.root == "/mine"
    for dataset in ("synthetic", "digits"):
        assert parse_config({"data": {"dataset": dataset, "num_classes": 3}}).data.root is None


def test_the_default_data_folder_needs_no_data_section(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DL2PA_DATA", "/data")
    assert parse_config({}).data.root == "/data"


def test_a_configuration_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("tree", "loss", "assignment", "loader"),
    [
        ({}, "squared_cosine", "dynamic", "dali"),
        ({"method": {"name": "psc"}}, "cross_entropy", "static", "dali"),
        ({"method": {"name": "hpn"}, "data": {"dataset": "cifar10"}}, "squared_cosine", "static", "resident"),
        ({"method": {"name": "etf"}}, "dot_regression", "static", "dali"),
        ({"method": {"name": "ebv", "assignment": "dynamic"}}, "cross_entropy", "dynamic", "dali"),
        ({"method": {"name": "kasarla", "loss": "squared_cosine"}}, "squared_cosine", "static", "dali"),
        (
            {"method": {"loss": "dot_regression", "assignment": "static"}, "data": {"dataset": "digits"}},
            "dot_regression",
            "static",
            "dali",
        ),
        (
            {"data": {"dataset": "synthetic", "num_classes": 3}},
            "squared_cosine",
            "dynamic",
            "synthetic",
        ),
        ({"data": {"loader": "torchvision"}}, "squared_cosine", "dynamic", "torchvision"),
    ],
)
def test_defaults_follow_the_method_and_the_data(
    tree: dict[str, Any], loss: str, assignment: str, loader: str
) -> None:
    config = parse_config(tree)
    assert (config.loss, config.assignment, config.loader) == (loss, assignment, loader)


@pytest.mark.parametrize(
    ("batch", "shards"),
    [(1, 1), (3, 1), (4, 1), (48, 12), (50, 10), (128, 32), (1024, 256), (7, 1), (1030, 206)],
)
def test_default_virtual_shards_have_at_least_four_samples(batch: int, shards: int) -> None:
    assert parse_config({"train": {"batch_size": batch}}).virtual_shards == shards


def test_the_resolved_file_is_plain_yaml() -> None:
    tree = yaml.safe_load(dump_config(Config()))
    assert list(tree) == [
        "data",
        "model",
        "method",
        "optim",
        "train",
        "checkpoint",
        "tracking",
        "launch",
        "notify",
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sweeps").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_sweep_has_variants_that_are_valid_and_differ(path: Path) -> None:
    sweep = load_sweep(path)
    fingerprints = set()
    for file, overrides in sweep.variant_texts().values():
        config = load_config(path.parent / str(file or sweep.config), [*sweep.override_texts(), *overrides])
        check_method(config, 100)
        fingerprints.add(fingerprint(config))
        if not any(text.startswith("method.loss=") for text in overrides):
            assert not [text for text in warnings(config, 100) if text.startswith("method.scale is ignored")]
    assert len(fingerprints) == len(sweep.variants) > 1
