"""Files and folders that a command cannot write: one message with the option, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from dl2pa.commands.options import check_output_file
from dl2pa.config import dump_config, parse_config
from dl2pa.config.yaml_core import parse_yaml
from support.commands import run_here

CONFIG = """
data: {dataset: synthetic, num_classes: 10, image_size: 8}
model: {backbone: resnet8, embedding_dim: 9}
train: {epochs: 1, batch_size: 16}
launch: {device: cpu}
tracking: {uri: none}
"""
PLACE = ["prototypes", "--num-classes", "5", "--dim", "6"]
COMMANDS = [
    ("--out", ["init", "images", "--out", "PLACE.yaml"]),
    ("--out", ["features", "c.yaml", "--out", "PLACE"]),
    ("--out", ["export", "finished", "--out", "PLACE"]),
    ("--out", ["predict", "finished", "images", "--out", "PLACE.csv"]),
    ("--out", ["embed", "finished", "images", "--out", "PLACE.npz"]),
    ("--out", [*PLACE, "--out", "PLACE.npy"]),
    ("--plot", [*PLACE, "--plot", "PLACE.png"]),
    ("--out", ["report", "finished", "--out", "PLACE"]),
    ("--out", ["report", "--compare", "finished", "finished", "--out", "PLACE"]),
    ("--out", ["data", "index", "images", "--out", "PLACE.index"]),
    ("OUT", ["data", "pack", "images", "PLACE"]),
    ("--write-profile", ["doctor", "--write-profile", "PLACE.yaml"]),
    ("--write-script", ["submit", "c.yaml", "--write-script", "PLACE.sh"]),
    ("run-dir", ["submit", "c.yaml", "--run-dir", "PLACE"]),
    ("run-dir", ["train", "c.yaml", "--run-dir", "PLACE"]),
    ("run-dir", ["sweep", "c.yaml", "--seeds", "0..0", "--run-dir", "PLACE"]),
]

PLACES = {"refused": "/proc/x", "deeper": "/proc/x/y", "below a file": "c.yaml/x", "too long": "n" * 300}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    for name, text in {
        "c.yaml": CONFIG,
        "finished/config.yaml": dump_config(parse_config(parse_yaml(CONFIG))),
        "finished/status.json": "{}",
        "finished/model.safetensors": "",
        **{f"images/{split}/{label}/1.png": "" for split in ("train", "val") for label in ("cat", "dog")},
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("out", ["finished", "other"])
def test_export_replaces_the_model_of_no_run(out: str, folder: Path) -> None:
    (folder / "other").mkdir(exist_ok=True)
    (folder / "other/config.yaml").write_text("", encoding="utf-8")
    done = run_here("export", "finished", "--out", out, "--json", folder=folder)
    assert (done.code, done.result["error"]["field"]) == (2, "--out"), done.error
    assert "is a run directory" in done.error


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize(("field", "words"), COMMANDS, ids=[" ".join(words) for _, words in COMMANDS])
def test_an_output_that_cannot_be_written_is_refused(
    field: str, words: list[str], place: str, folder: Path
) -> None:
    before = sorted(folder.rglob("*"))
    done = run_here(*(word.replace("PLACE", place) for word in words), "--json", folder=folder)
    assert done.code == 2, done.error
    error = done.result["error"]
    assert error["field"] == field
    assert place in error["value"]
    assert error["remedy"]
    assert len(done.error.splitlines()) == 1, done.error
    assert sorted(folder.rglob("*")) == before


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        check_output_file("--out", tmp_path)
    check_output_file("--out", tmp_path / "new" / "x.csv")
    assert list(tmp_path.iterdir()) == []
