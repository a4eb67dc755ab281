"""Messages for invalid values of every key, and the report of all problems together."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dl2pa import redaction
from dl2pa.cli import main
from dl2pa.config import load_config, parse_config
from dl2pa.config.explain import Key, keys_of
from dl2pa.config.schema import Config
from dl2pa.config.schema_errors import form_of
from dl2pa.config.sweep import Sweep, load_sweep
from dl2pa.errors import UserError, UserErrors

KEYS = keys_of(Config)
WRONG: list[Any] = [
    True,
    -1,
    0,
    2.5,
    1e9,
    float("nan"),
    float("inf"),
    "many",
    "",
    None,
    [],
    [1, 2],
    ["a"],
    {"a": 1},
]
"""Values of a wrong type, out of range, of a wrong word or a wrong length for most keys."""
LIBRARY_WORDS = ("input should", "valid ", "unable to parse", "field required", "value error")
"""Parts of pydantic's messages, which do not name what is accepted."""


@pytest.fixture(autouse=True)
def no_hidden_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong values of `notify.url` are hidden in the output of these tests only."""
    monkeypatch.setattr(redaction, "_hidden_addresses", {})


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def refused(call: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    return caught.value


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_every_wrong_value_of_a_key_is_one_problem_with_the_accepted_forms(key: Key) -> None:
    messages: list[str] = []
    for value in WRONG:
        try:
            parse_config(nested(key.name, value))
        except UserError as error:
            assert error.problems == (error,), error
            assert f"{error.field}.".startswith(f"{key.name}.")
            assert "\n" not in str(error) and error.remedy.endswith((".", "?"))
            assert not any(words in str(error).lower() for words in LIBRARY_WORDS), error
            if "must be text" not in error.message and key.name != "model.backbone":
                assert form_of(key) in error.message
            messages.append(str(error))
    assert len(messages) >= 8, "most of the values are wrong for every key"


@pytest.mark.parametrize(
    ("key", "form"),
    [
        ("launch.nproc", "auto or an integer ≥ 1"),
        ("train.compile", "true, false or graphs"),
        ("data.classes", "a path, a list of texts or null"),
        ("data.imbalance", "a number > 0 and < 1, or null"),
        ("model.freeze_epochs", "an integer ≥ 0 or all"),
        ("optim.milestones", "a list of integers ≥ 1"),
        ("data.crop_ratio", "a list [number > 0, number > 0]"),
        ("optim.betas", "a list [number ≥ 0 and < 1, number ≥ 0 and < 1]"),
        ("tracking.tags", "a mapping of names to texts"),
    ],
)
def test_all_forms_of_a_key_are_named(key: str, form: str) -> None:
    assert {k.name: form_of(k) for k in KEYS}[key] == form


def test_a_function_with_a_dot_is_corrected() -> None:
    error = refused(lambda: parse_config(nested("data.dataset", "birds.table.images")))
    assert (error.field, error.remedy) == ("data.dataset", "For a function, write birds.table:images.")


@pytest.mark.parametrize("value", [0, "many", True, 1.5])
def test_a_wrong_number_of_processes_names_auto_and_numbers(value: Any) -> None:
    error = refused(lambda: parse_config(nested("launch.nproc", value)))
    assert (error.field, error.value) == ("launch.nproc", value)
    assert error.message.startswith("must be auto or an integer ≥ 1")


@pytest.mark.parametrize(
    "key", [k for k in KEYS if any(len(str(w)) > 3 for w in k.allowed)], ids=lambda k: k.name
)
def test_a_misspelled_word_is_corrected(key: Key) -> None:
    for word in (w for w in key.allowed if isinstance(w, str) and len(w) > 3):
        for misspelled in (word[:-2] + word[-1] + word[-2], word.upper()):
            if misspelled not in key.allowed:
                error = refused(lambda m=misspelled: parse_config(nested(key.name, m)))
                assert error.remedy == f"Did you mean {word}?"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "optim.lr"),
        ("optim.epochs", "train.epochs"),
        ("train.learning_rate", "optim.lr"),
        ("train.momentum", "method.match.momentum or optim.momentum"),
        ("data.embedding_dim", "model.embedding_dim"),
        ("optim.learning_rat", None),
    ],
)
def test_a_key_in_the_wrong_section_is_corrected(key: str, meant: str | None) -> None:
    remedy = refused(lambda: parse_config(nested(key, 1))).remedy
    expected = "Known: " if meant is None else f"Did you mean {meant}?"
    assert remedy.startswith(expected)


def test_each_value_of_a_mapping_is_a_problem_of_its_own() -> None:
    error = refused(lambda: parse_config({"tracking": {"tags": {"a": 1, "b": "x", "c": ["y"]}}}))
    assert [p.field for p in error.problems] == ["tracking.tags.a", "tracking.tags.c"]
    assert error.problems[1].message == "must be text"


def test_many_numbers_in_a_list_of_texts_are_one_problem() -> None:
    error = refused(lambda: parse_config({"data": {"classes": ["a", *range(50)]}}))
    assert error.field == "data.classes.1" and error.problems == (error,)
    assert error.message.endswith("but must be text, like 49 others of the list")


BROKEN = """\
base: base.yaml
data:
  loader: resident
  crop_scale: [0.9, 0.1]
  mean: [0.5, 0.5]
optim: {lr: -1, lrr: 3}
train:
  epoch: 3
  batch_size: 100
  virtual_shards: 7
launch:
  nproc: many
tracking:
  uri: ftp://x
"""
BASE = "data:\n  dataset: cifar10\n  crop: random_resized\ntrain: {precision: bf61}\n"


def test_all_problems_are_reported_together_with_their_lines(write: Callable[[str, str], Path]) -> None:
    base, path = write("base.yaml", BASE), write("a.yaml", BROKEN)
    error = refused(lambda: load_config(path, ["method.margin=-1", "checkpoint.kep=3", "words"]))
    places = {problem.field: problem.place for problem in error.problems}
    assert places == {
        "override": None,
        "data.mean": f"{path}:5",
        "optim.lr": f"{path}:6",
        "optim.lrr": f"{path}:6",
        "train.epoch": f"{path}:8",
        "train.precision": f"{base}:4",
        "launch.nproc": f"{path}:12",
        "method.margin": None,
        "checkpoint.kep": None,
        "data.crop": f"{base}:3",
        "data.crop_scale": f"{path}:4",
        "train.virtual_shards": f"{path}:10",
        "tracking.uri": f"{path}:14",
    }
    lines = str(error).splitlines()
    assert lines[0] == "13 problems:" and len(lines) == 14
    assert f"  train.epoch=3: unknown key. Did you mean train.epochs? ({path}:8)" in lines


def test_a_single_problem_is_one_line_with_its_place(write: Callable[[str, str], Path]) -> None:
    path = write("a.yaml", "optim:\n  lr: -1\n")
    error = refused(lambda: load_config(path))
    assert type(error) is UserError
    assert str(error) == (
        f"optim.lr=-1: must be a number > 0. Give another value; the default is 0.5. ({path}:2)"
    )
    assert refused(lambda: load_config(path, ["optim.lr=-2"])).place is None


@pytest.mark.parametrize(
    ("wrong", "kept"),
    [
        ({"train.batch_size": "x"}, []),
        ({"train.batch_sise": 8}, []),
        ({"train.epochs": 0}, ["train.virtual_shards"]),
        ({"train": 5}, []),
        ({"trian.batch_size": 7}, []),
    ],
)
def test_a_check_that_needs_an_invalid_key_is_not_made(
    wrong: dict[str, Any], kept: list[str], write: Callable[[str, str], Path]
) -> None:
    """7 virtual shards do not divide the default batch, but that is not the batch the user means."""
    path = write("a.yaml", "train: {virtual_shards: 7}")
    overrides = [f"{key}={value}" for key, value in wrong.items()]
    fields = [problem.field for problem in refused(lambda: load_config(path, overrides)).problems]
    assert fields == [*(key.replace("trian.batch_size", "trian") for key in wrong), *kept]


def test_undefined_variables_and_a_missing_file_are_reported_with_the_rest(
    write: Callable[[str, str], Path], tmp_path: Path
) -> None:
    path = write("a.yaml", "data: {root: $DL2PA_NOT_SET, index: $DL2PA_NOT_SET, flip: 2}")
    fields = [problem.field for problem in refused(lambda: load_config(path)).problems]
    assert fields == ["data.root", "data.index", "data.flip"]
    error = refused(lambda: load_config(tmp_path / "gone.yaml", ["x", "y"]))
    assert [problem.field for problem in error.problems] == ["config", "override", "override"]


def test_all_problems_of_a_sweep_file_are_reported_together(write: Callable[[str, str], Path]) -> None:
    path = write("s.yaml", "sweep:\n  confg: a.yaml\n  grid: 3\n  parallel: 0\ntrain: {}\n")
    problems = {p.field: (p.place, p.remedy) for p in refused(lambda: load_sweep(path)).problems}
    assert {field: place for field, (place, _) in problems.items()} == {
        "train": f"{path}:5",
        "sweep.confg": f"{path}:2",
        "sweep.grid": f"{path}:3",
        "sweep.parallel": f"{path}:4",
    }
    assert problems["sweep.confg"][1] == "Did you mean sweep.config?"
    assert {form_of(key) for key in keys_of(Sweep, "sweep.")} >= {"a mapping", "an integer ≥ 1 or null"}


def test_problems_of_all_runs_of_a_sweep_are_reported_once(
    write: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("a.yaml", f"data:\n  root: {tmp_path}/gone\ntrain: {{batch_size: 100}}\n")
    path = write(
        "s.yaml", "sweep:\n  config: a.yaml\n  grid:\n    optim.lr: [-1, 0.1]\n    train.epochs: [1, 0, x]\n"
    )
    assert main(["sweep", str(path), "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["error"]["problems"]
    assert [(p["field"], p["value"], p["place"]) for p in problems][:3] == [
        ("optim.lr", -1, f"{path}:4"),
        ("data.root", f"{tmp_path}/gone", f"{tmp_path}/a.yaml:2"),
        ("train.epochs", 0, f"{path}:5"),
    ]
    assert len(problems) == 4


def test_missing_files_and_invalid_settings_of_a_training_are_reported_together(
    write: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("a.yaml", f"data: {{root: {tmp_path}/gone}}\nmodel:\n  init: gone.pt\n")
    overrides = ["train.virtual_shards=7", "method.prototypes=simplx"]
    assert main(["train", str(path), *overrides, "--run-dir", str(tmp_path / "run"), "--json"]) == 2
    output = capsys.readouterr()
    problems = {p["field"]: p for p in json.loads(output.out)["error"]["problems"]}
    assert problems.keys() == {"model.init", "train.virtual_shards", "data.root", "method.prototypes"}
    assert problems["model.init"]["place"] == f"{path}:3"
    assert "Did you mean simplex?" in problems["method.prototypes"]["remedy"]
    assert output.err.startswith("dl2pa: 4 problems:\n  ")
    assert not (tmp_path / "run").exists()


def test_several_problems_survive_a_process_boundary() -> None:
    first, second = UserError("a", 1, "is bad", "Use 2."), UserError("b", "x", "is worse", "Use y.")
    second.place = "f.yaml:3"
    error = UserErrors([first, second])
    for copy in (
        pickle.loads(pickle.dumps(error)),
        UserError.from_dict(json.loads(json.dumps(error.as_dict()))),
    ):
        assert (
            str(copy)
            == str(error)
            == ("2 problems:\n  a=1: is bad. Use 2.\n  b='x': is worse. Use y. (f.yaml:3)")
        )
