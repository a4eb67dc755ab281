"""Values of configuration files and overrides: types, quotes, keys given twice, paths, recorded configurations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dl2pa.commands.sweep import SweepRequest
from dl2pa.config import Config, dump_config, load_config, load_recorded_config, parse_config
from dl2pa.config.load import read_yaml
from dl2pa.config.paths import expand_path, literal_path
from dl2pa.config.sweep import load_sweep
from dl2pa.config.yaml_core import dump_yaml, parse_value, parse_yaml, value_text
from dl2pa.errors import UserError
from dl2pa.runplan import expand

SCALARS = [
    ("5", 5),
    ("-1", -1),
    ("017", 17),
    ("0o17", 15),
    ("0x1F", 31),
    ("0.1", 0.1),
    (".5", 0.5),
    ("1e-3", 1e-3),
    ("1E5", 1e5),
    (".inf", float("inf")),
    ("true", True),
    ("FALSE", False),
    ("null", None),
    ("yes", "yes"),
    ("no", "no"),
    ("on", "on"),
    ("off", "off"),
    ("1:30", "1:30"),
    ("1_000", "1_000"),
    ("0b11", "0b11"),
    ("2024-01-01", "2024-01-01"),
    ("2024-02-30", "2024-02-30"),
    ("2024-01-01 10:00:00", "2024-01-01 10:00:00"),
]
"""Plain scalars of YAML 1.2 that YAML 1.1 reads as another value or refuses, and common ones."""
TEXTS = [
    *(text for text, _ in SCALARS),
    *(
        "",
        "~",
        "y",
        "=",
        "<<",
        "-",
        "- a",
        "!x",
        "*x",
        "&x",
        "a: b",
        "a #b",
        "'q'",
        '"q"',
        "[x]",
        "{x}",
        "[",
        "'",
    ),
    *(
        " x ",
        "tab\t",
        "line\nbreak",
        "é 😀",
        "$HOME",
        "~/x",
        "C:\\new",
        "a,b",
        "@x",
        "%x",
        "| x",
        "? x",
        "1.5e+3",
    ),
]
"""Texts that YAML 1.1, YAML 1.2 or an override could read as something else."""


def refused(call: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    return caught.value


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_a_scalar_means_the_same_in_a_file_and_an_override(text: str, value: Any) -> None:
    for read in (parse_yaml(f"a: {text}")["a"], parse_yaml(f"[{text}]")[0], parse_value("a", text)):
        assert (read, type(read)) == (value, type(value))


def test_numbers_of_a_configuration_follow_yaml_1_2(write: Callable[[str], Path]) -> None:
    config = load_config(
        write("train: {seed: 017, sync_bn: yes}\noptim: {lr: 1e-3}\nmodel: {widths: [0o20, 32, 64]}")
    )
    assert (config.train.seed, config.train.sync_bn, config.optim.lr) == (17, True, 1e-3)
    assert config.model.widths == (16, 32, 64)
    dated = load_config(write("tracking: {run_name: 2024-02-30, tags: {time: 1:30, night: off}}")).tracking
    assert (dated.run_name, dated.tags) == ("2024-02-30", {"time": "1:30", "night": "off"})


@pytest.mark.parametrize(
    ("text", "line", "first"),
    [
        ("train: {epochs: 1}\ntrain: {epochs: 2}", 2, 1),
        ("optim:\n  lr: 1\n  name: sgd\n  lr: 2", 4, 2),
        ("tracking: {tags: {a: x, 'a': y}}", 1, 1),
        ("method:\n  match:\n    momentum: 0\n    momentum: 0.5", 4, 3),
    ],
)
def test_a_key_given_twice_is_refused_with_both_lines(
    write: Callable[[str], Path], text: str, line: int, first: int
) -> None:
    for load in (load_config, load_recorded_config, read_yaml, load_sweep):
        error = refused(lambda load=load: load(write(text)))
        assert error.field == "config"
        assert f"line {line}: the key " in error.message
        assert f"already set in line {first}" in error.message


def test_a_key_given_twice_in_a_sweep_or_an_override_is_refused(write: Callable[[str], Path]) -> None:
    sweep = "sweep:\n  config: a.yaml\n  overrides: {optim.lr: 1}\n  overrides: {optim.lr: 2}"
    assert "'overrides' is already set in line 3" in refused(lambda: load_sweep(write(sweep))).message
    twice = "sweep: {config: a.yaml, grid: {train.seed: [1, 2]}, seeds: 0..4}"
    error = refused(lambda: load_sweep(write(twice)))
    assert (error.field, error.value) == ("sweep.seeds", "0..4") and "given twice" in error.message
    error = refused(lambda: load_config(write(""), ["tracking.tags={a: x, a: y}"]))
    assert error.field == "tracking.tags"
    assert "'a' is already set" in error.message


def test_a_merge_key_may_be_overridden() -> None:
    tree = parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}")
    assert tree["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize("value", ["!!binary aGk=", "!!timestamp 2024-01-01", "!!set {a}", "!mine x"])
def test_a_type_that_no_key_has_is_refused(write: Callable[[str], Path], value: str) -> None:
    error = refused(lambda: load_config(write(f"tracking:\n  run_name: {value}")))
    assert f"line 2: the tag {value.split()[0]} is not supported" in error.message


@pytest.mark.parametrize(
    ("text", "field", "kind"),
    [
        ("data: {root: 1e5}", "data.root", "a number"),
        ("data: {val_root: true}", "data.val_root", "true or false"),
        ("tracking: {experiment: 007}", "tracking.experiment", "a number"),
        ("tracking: {experiment: null}", "tracking.experiment", "null"),
        ("tracking: {tags: {version: 1.10}}", "tracking.tags.version", "a number"),
        ("tracking: {tags: {2024: a}}", "tracking.tags.2024", "a number"),
        ("data: {classes: [a, 2, c]}", "data.classes.1", "a number"),
        ("data: {classes: [yes, no, true]}", "data.classes.2", "true or false"),
        ("data: {classes: [none, null]}", "data.classes.1", "null"),
        ("data: {classes: 10}", "data.classes", "a number"),
        ("method: {prototypes: 0o17}", "method.prototypes", "a number"),
        ("launch: {interface: 0}", "launch.interface", "a number"),
    ],
)
def test_text_that_looks_like_another_type_must_be_quoted(
    write: Callable[[str], Path], text: str, field: str, kind: str
) -> None:
    error = refused(lambda: load_config(write(text)))
    assert (error.field, error.message) == (field, f"was read as {kind}, but must be text")
    assert "Put it in quotes" in error.remedy


def test_the_quotes_of_the_remedy_work(write: Callable[[str], Path]) -> None:
    error = refused(lambda: load_config(write(""), ["tracking.run_name=123"]))
    assert """'tracking.run_name="TEXT"'""" in error.remedy
    assert load_config(write(""), ['tracking.run_name="123"']).tracking.run_name == "123"
    error = refused(lambda: load_config(write(""), ["data.classes=[1, 2]"]))
    assert """'data.classes=["TEXT"]'""" in error.remedy
    assert load_config(write(""), ['data.classes=["1", "2"]']).data.classes == ("1", "2")
    error = refused(lambda: load_config(write(""), ["tracking.tags.v=1"]))
    assert """'tracking.tags.v="TEXT"'""" in error.remedy
    assert load_config(write(""), ['tracking.tags.v="1"']).tracking.tags == {"v": "1"}
    assert load_config(write('data: {root: "1e5"}')).data.root == "1e5"


def test_a_key_that_is_not_text_is_unknown(write: Callable[[str], Path]) -> None:
    for text, field in (("1: {}", "1"), ("train: {1: 2}", "train.1"), ("true: 1", "1"), ("null: 1", "None")):
        error = refused(lambda text=text: load_config(write(text)))
        assert (error.field, error.message) == (field, "unknown key")


@pytest.mark.parametrize(
    "text",
    [
        "a: b",
        "a #b",
        "*x",
        "&x y",
        "!t x",
        "| x",
        "> x",
        "%a",
        "@a",
        "- a",
        "? a",
        "{a",
        "[1",
        "a]",
        "'",
        "~",
        "~x",
    ],
)
def test_other_override_values_are_literal(write: Callable[[str], Path], text: str) -> None:
    assert load_config(write(""), [f"tracking.run_name= {text} "]).tracking.run_name == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("  ", None),
        ("[1, a, true]", [1, "a", True]),
        ("{a: 1, b: [x]}", {"a": 1, "b": ["x"]}),
        ('"a # b"', "a # b"),
        ("'it''s'", "it's"),
        ('"\\u00e9"', "é"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_an_override_may_be_null_a_list_a_mapping_or_quoted(text: str, value: Any) -> None:
    assert parse_value("key", text) == value


@pytest.mark.parametrize(
    ("text", "kind"),
    [("[a: b: c]", "list"), ("{a: b: c}", "mapping"), ('"a" and "b"', "quoted text"), ("['a]", "list")],
)
def test_invalid_brackets_or_quotes_of_an_override_are_refused(text: str, kind: str) -> None:
    error = refused(lambda: parse_value("some.key", text))
    assert (error.field, error.value) == ("some.key", text)
    assert f"is not a valid {kind}" in error.message


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_survives_the_recorded_file_and_an_override(text: str) -> None:
    tree = {"text": text, "list": [text, 1, None], text: 1.5}
    written = dump_yaml(tree)
    assert (
        parse_yaml(written) == parse_yaml(written, written_by_dl2pa=True) == yaml.safe_load(written) == tree
    )
    assert parse_value("key", value_text(text)) == text


@pytest.mark.parametrize("value", [1, -1.5, 1e-5, 1e22, 0.1, True, None, [1, "a", None], {"a": "1", "b": 1}])
def test_every_value_survives_the_recorded_file_and_an_override(value: Any) -> None:
    assert parse_yaml(dump_yaml({"a": value})) == yaml.safe_load(dump_yaml({"a": value})) == {"a": value}
    assert parse_value("key", value_text(value)) == value


def _with_texts(texts: list[str]) -> Config:
    tags = {text: text for text in texts}
    return parse_config(
        {"data": {"root": "1e5", "classes": texts}, "tracking": {"run_name": "0o17", "tags": tags}}
    )


def test_a_configuration_recorded_by_an_older_version_reads_back_the_same(
    write: Callable[[str], Path],
) -> None:
    config = _with_texts(TEXTS)
    old = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None)
    assert "root: 1e5\n" in old or "root: 1e5," in old, "the older versions did not quote it"
    assert load_recorded_config(write(old)) == config
    assert refused(lambda: load_config(write(old))).field == "data.root"


def test_a_recorded_configuration_reads_back_the_same_from_any_place(write: Callable[[str], Path]) -> None:
    config = _with_texts(TEXTS)
    path = write(dump_config(config))
    assert load_recorded_config(path) == load_config(path) == config


def test_paths_are_expanded(write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATASETS", "/data/sets")
    text = """
data: {root: ~/cifar, val_root: "$DATASETS/val", index: "${DATASETS}/a.index", classes: ~/classes.txt}
method: {prototypes: $DATASETS/p.npy, class_vectors: ~/v.npy}
tracking: {uri: "sqlite:///~/runs.db", run_name: ~/$DATASETS, tags: {a: $HOME}}
"""
    config = load_config(write(text))
    data, method, tracking = config.data, config.method, config.tracking
    assert (data.root, data.val_root, data.index) == (
        "/home/me/cifar",
        "/data/sets/val",
        "/data/sets/a.index",
    )
    assert (data.classes, method.class_vectors) == ("/home/me/classes.txt", "/home/me/v.npy")
    assert (method.prototypes, tracking.uri) == ("/data/sets/p.npy", "sqlite:////home/me/runs.db")
    assert (tracking.run_name, tracking.tags) == ("~/$DATASETS", {"a": "$HOME"})
    assert load_config(write(""), ["data.root=~/x", "data={index: ~/i}"]).data.root == "/home/me/x"
    assert load_config(write("data: {classes: [~/a, $HOME]}")).data.classes == ("~/a", "$HOME")


def test_bases_sweeps_and_grids_may_name_files_by_variables(
    tmp_path: Path, write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dl2pa.cli import build_parser
    from dl2pa.commands import sweep

    monkeypatch.setenv("PLACE", str(tmp_path / "place"))
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "base.yaml").write_text("train: {epochs: 7}", encoding="utf-8")
    assert load_config(write("base: $PLACE/base.yaml")).train.epochs == 7
    (spec,) = expand(Path("other.yaml"), [], ["config=$PLACE/base.yaml"])
    assert spec.config_file == tmp_path / "place" / "base.yaml"
    path = write(
        "sweep: {config: $PLACE/base.yaml, variants: {a: {config: $PLACE/b.yaml}, b: {optim.lr: 1}}}"
    )
    args = build_parser("sweep").parse_args(["sweep", str(path)])
    request: SweepRequest = sweep._read_request(args)  # pyright: ignore[reportPrivateUsage]
    assert [str(config) for _, config, _ in request.variants] == [
        f"{tmp_path}/place/{n}.yaml" for n in ("b", "base")
    ]


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("a$$b/$$HOME", "a$b/$HOME"),
        ("./~/x", "./~/x"),
        ("x/~", "x/~"),
        ("100$", "100$"),
        ("$1/$-", "$1/$-"),
        ("postgresql://me:pa$$word@host/~db", "postgresql://me:pa$$word@host/~db"),
        ("http://host/$HOME", "http://host/$HOME"),
        ("sqlite:////abs/$$x", "sqlite:////abs/$x"),
        ("none", "none"),
        ("", ""),
    ],
)
def test_other_text_of_a_path_is_not_expanded(text: str, expanded: str) -> None:
    assert expand_path("tracking.uri", text) == expanded


@pytest.mark.parametrize(
    ("path", "message", "literal"),
    [
        ("$DL2PA_NOT_SET/x", "the environment variable DL2PA_NOT_SET is not set", "$$DL2PA_NOT_SET/x"),
        ("/x/${DL2PA_NOT_SET}", "the environment variable DL2PA_NOT_SET is not set", "/x/$${DL2PA_NOT_SET}"),
        ("$DL2PA_EMPTY/x", "the environment variable DL2PA_EMPTY is empty", "$$DL2PA_EMPTY/x"),
        ("~no-such-user/x", "~no-such-user is not the home folder of a user", "./~no-such-user/x"),
    ],
)
def test_a_path_that_cannot_be_expanded_is_refused(
    write: Callable[[str], Path], path: str, message: str, literal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DL2PA_EMPTY", "")
    error = refused(lambda: load_config(write(""), [f"data.root={path}"]))
    assert (error.field, error.message) == ("data.root", message)
    assert load_config(write(""), [f"data.root={literal}"]).data.root == literal.replace("$$", "$")


OTHER_SECTIONS = "\nmodel: {}\nmethod: {}\noptim: {}\ntrain: {}\n"


def test_recorded_paths_are_not_expanded_again(
    write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    path = write('data: {root: "/data/$DL2PA_NOT_SET", val_root: "~/x"}' + OTHER_SECTIONS)
    assert load_recorded_config(path).data.root == "/data/$DL2PA_NOT_SET"
    config = load_recorded_config(path, ["data.val_root=~/val"])
    assert (config.data.root, config.data.val_root) == ("/data/$DL2PA_NOT_SET", "/home/me/val")


def test_a_file_that_cannot_be_read_is_named(write: Callable[[str], Path]) -> None:
    path = write("")
    path.write_bytes(b"tracking: {run_name: \xff}")
    assert "utf-8" in refused(lambda: load_config(path)).message


@pytest.mark.parametrize(
    "path", ["/a b", "/a $HOME/${X}", "~", "~root/x", "sqlite:////a$b/mlflow.db", "$$", "a/~"]
)
def test_a_literal_path_is_not_expanded(path: str) -> None:
    expanded = expand_path("data.root", literal_path(path))
    assert expanded == (f"./{path}" if path.startswith("~") else path)
