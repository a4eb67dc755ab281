"""Wrong input: one message with field, value and remedy, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

USER_ERROR, FAILURE = 2, 1


@dataclass(frozen=True)
class Places:
    """What a row's command line may refer to."""

    folder: Path
    config: Path
    digits: Path
    run: Path

    def file(self, name: str, content: str | bytes = "") -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


Command = Callable[[Places], list[object]]


def training(*overrides: str, nproc: int = 1) -> Command:
    return lambda p: ["train", p.config, *overrides, "--nproc", nproc, "--run-dir", p.run]


def _prototypes(places: Places, points: Any) -> list[object]:
    np.save(places.folder / "points.npy", points)
    return training(f"method.prototypes={places.folder / 'points.npy'}")(places)


def _class_vectors(places: Places, vectors: Any) -> list[object]:
    np.save(places.folder / "vectors.npy", vectors)
    return training("method.name=word2vec", f"method.class_vectors={places.folder / 'vectors.npy'}")(places)


def _damaged_prototypes(places: Places) -> list[object]:
    file = places.file("points.safetensors", b"\x08" + bytes(30))
    return training(f"method.prototypes={file}")(places)


def _class_list(places: Places) -> list[object]:
    file = places.file("classes.txt", "\n".join("012345678"))
    return training(f"data.classes={file}")(places)


def _empty_folder(places: Places) -> list[object]:
    (places.folder / "empty").mkdir()
    return training(f"data.root={places.folder / 'empty'}")(places)


# name: (command, field, part of the value or message, part of the remedy)
ROWS: dict[str, tuple[Command, str, str, str]] = {
    "unknown key": (training("train.epoch=5"), "train.epoch", "unknown key", "train.epochs"),
    "unknown section": (training("trian.epochs=5"), "trian", "unknown key", "train"),
    "wrong type": (training("train.epochs=many"), "train.epochs", "many", "dl2pa config"),
    "not key=value": (training("train.epochs"), "override", "train.epochs", "train.epochs=5"),
    "missing data folder": (training("data.root=/nowhere/at/all"), "data.root", "/nowhere/at/all", "folder"),
    "folder without halves": (_empty_folder, "data.root", "empty", "train"),
    "no data folder given": (training("data.root="), "data.root", "not set", "DL2PA_DATA"),
    "class count": (training("data.num_classes=11"), "data.num_classes", "11", "data.num_classes=10"),
    "class list lacks a folder": (_class_list, "data.classes", "'9'", "data.classes"),
    "class list missing": (training("data.classes=/no/list"), "data.classes", "/no/list", "class a line"),
    "d = 0": (training("model.embedding_dim=0"), "model.embedding_dim", "0", ""),
    "d = 1": (training("model.embedding_dim=1"), "model.embedding_dim", "1", ""),
    "synthetic C = 1": (
        training("data.dataset=synthetic", "data.root=", "data.num_classes=1"),
        "data.num_classes",
        "1",
        "",
    ),
    "no GPU": (training("launch.device=cuda"), "launch.device", "cuda", "launch.device=cpu"),
    "no GPU, two processes": (training("launch.device=cuda", nproc=2), "launch.device", "cuda", "cpu"),
    "processes do not divide": (training(nproc=5), "launch.nproc", "5", "[1, 2, 3, 4, 6, 12]"),
    "no process": (training(nproc=0), "launch.nproc", "0", ""),
    "batch larger than set": (training("train.batch_size=2000"), "train.batch_size", "2000", "1438"),
    "prototypes of another d": (
        lambda p: _prototypes(p, np.eye(10, 7, dtype=np.float32)),
        "method.prototypes",
        "7",
        "",
    ),
    "prototypes of another C": (
        lambda p: _prototypes(p, np.eye(5, 5, dtype=np.float32)),
        "method.prototypes",
        "5",
        "",
    ),
    "prototypes damaged": (_damaged_prototypes, "method.prototypes", "points.safetensors", ""),
    "prototypes missing": (training("method.prototypes=/no.npy"), "method.prototypes", "/no.npy", ""),
    "class vectors missing": (
        training("method.class_vectors=/no.npy"),
        "method.class_vectors",
        "/no.npy",
        "",
    ),
    "word2vec without vectors": (training("method.name=word2vec"), "method.class_vectors", "", ".npy"),
    "word2vec of classes alike": (
        lambda p: _class_vectors(p, np.ones((10, 4), dtype=np.float32)),
        "method.class_vectors",
        "",
        "tell all classes apart",
    ),
    "no room for kasarla's simplex": (
        training("method.name=kasarla", "model.embedding_dim=8"),
        "model.embedding_dim",
        "8",
        "model.embedding_dim=9",
    ),
    "more orthonormal rows than dimensions": (
        training("method.name=goto", "model.embedding_dim=3"),
        "method.sub_prototypes",
        "4",
        "at most 3",
    ),
    "missing config": (lambda p: ["train", p.folder / "none.yaml"], "config", "none.yaml", "YAML"),
    "broken YAML": (
        lambda p: ["train", p.file("broken.yaml", "train:\n  epochs: [1,\noptim: {")],
        "config",
        "broken.yaml",
        "Correct",
    ),
    "YAML without sections": (
        lambda p: ["train", p.file("list.yaml", "- 1\n")],
        "config",
        "list.yaml",
        "section",
    ),
    "missing base": (lambda p: ["train", p.file("up.yaml", "base: gone.yaml\n")], "config", "gone.yaml", ""),
    "circular base": (
        lambda p: ["train", p.file("loop.yaml", "base: loop.yaml\n")],
        "base",
        "loop.yaml",
        "circle",
    ),
    "unknown command": (lambda p: ["trian"], "command line", "trian", "--help"),
    "unknown option": (lambda p: ["train", p.config, "--epochs", 5], "command line", "--epochs", "--help"),
    "run directory is a file": (
        lambda p: ["train", p.config, "--run-dir", p.file("taken", "x")],
        "run-dir",
        "taken",
        "--run-dir",
    ),
    "evaluate a folder that is no run": (lambda p: ["evaluate", p.digits], "run", "digits", "dl2pa train"),
    "evaluate nothing": (lambda p: ["evaluate", p.folder / "no-run"], "run", "no-run", "dl2pa train"),
    "sync a folder that is no run": (lambda p: ["sync", p.digits], "run", "digits", ""),
    "export a folder that is no run": (lambda p: ["export", p.digits], "run", "digits", "dl2pa train"),
    "predict without a model": (
        lambda p: ["predict", p.digits, p.file("x.jpeg")],
        "model",
        "digits",
        "finished run",
    ),
}
NO_GPU = [name for name in ROWS if name.startswith("no GPU")]


def assert_refused(started: Any, field: str, seen: str, remedy: str) -> None:
    assert started.process.returncode == USER_ERROR, started.error
    assert "Traceback" not in started.error + started.output
    told = [line for line in started.error.splitlines() if line.startswith("dl2pa: ")]
    assert len(told) == 1, f"one message:\n{started.error}"
    for part in (field, seen, remedy):
        assert part in told[0]
    error = started.result["error"]
    assert set(error) == {"field", "value", "message", "remedy"}
    assert field in error["field"]
    assert seen in f"{error['value']} {error['message']}"
    assert error["remedy"] and remedy in error["remedy"]


@pytest.fixture
def places(tmp_path: Path, digits: Path, helpers: Any) -> Places:
    folder = tmp_path / 'it\'s a folder; with "quotes"'
    return Places(folder, helpers.config_with(folder, digits), digits, folder / "run")


@pytest.mark.parametrize("name", ROWS)
def test_refused(name: str, places: Places, program: Any) -> None:
    if name in NO_GPU and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    command, field, seen, remedy = ROWS[name]
    started = program.run(*command(places), "--json", env={"DL2PA_DATA": ""})
    assert_refused(started, field, seen, remedy)
    assert not (places.run / "checkpoints").exists() or not any((places.run / "checkpoints").iterdir())


def test_worker_tells_what_only_it_can_find(places: Places, program: Any) -> None:
    """Under torchrun the message still reaches the launching command."""
    file = sorted((places.digits / "val" / "3").iterdir())[0]
    shutil.copytree(places.digits / "val", places.folder / "val")
    bad = places.folder / "val" / "3" / file.name
    bad.write_bytes(b"no image at all")
    changed = (
        f"data.val_root={places.folder / 'val'}",
        f"data.root={places.digits / 'train'}",
        "train.max_steps=2",
    )
    started = program.run(*training(*changed, nproc=2)(places), "--json")
    assert_refused(started, "data.val_root", bad.name, "Restore")


def make_corrupt(root: Path) -> list[str]:
    """Break training images; returns those that must be counted: cut short, empty, text, undecodable."""
    folders = sorted((root / "train").iterdir())
    files = [sorted(folder.iterdir())[0] for folder in folders[:4]]
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[: len(whole) // 2])
    files[1].write_bytes(b"")
    files[2].write_text("this is no picture\n" * 20)
    # A Huffman table that cannot be: the header is sound, decoding fails.
    data = bytearray(files[3].read_bytes())
    table = data.index(b"\xff\xc4")
    data[table + 5 : table + 21] = b"\xff" * 16
    files[3].write_bytes(bytes(data))
    # Damage amid the compressed data: Pillow and DALI only warned and decoded zeros, random bytes, a restart
    # marker or an early end there, so it is not among the files to be counted; the run has to finish all the same.
    undetected = sorted(folders[4].iterdir())[0]
    data = bytearray(undetected.read_bytes())
    middle = (data.index(b"\xff\xda") + 14 + len(data)) // 2
    data[middle : middle + 40] = bytes(40)
    undetected.write_bytes(bytes(data))
    return [str(file) for file in files]


@pytest.fixture
def corrupt(digits: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    root = tmp_path / "corrupt"
    shutil.copytree(digits, root)
    return root, make_corrupt(root)


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_corrupt_training_images_are_counted_named_and_replaced(
    loader: str, corrupt: tuple[Path, list[str]], places: Places, program: Any
) -> None:
    root, files = corrupt
    started = program.run(
        *training(f"data.root={root}", f"data.loader={loader}", "train.epochs=2")(places), "--json"
    )
    assert started.process.returncode == 0, started.error
    log = (places.run / "logs" / "rank-0.log").read_text()
    for file in files:
        assert log.count(f"training image {file} ") == 1, f"told once: {file}"
    assert sorted(started.result["bad_images"]) == sorted(files)
    assert started.result["steps"] == 58


def test_corrupt_training_images_of_every_rank_are_in_the_result_after_a_kill_too(
    corrupt: tuple[Path, list[str]], places: Places, program: Any, train: Any, helpers: Any
) -> None:
    root, files = corrupt
    changes = {"data": {"root": str(root)}, "train": {"epochs": 1}}
    whole, cut = train(2, "whole", changes), train(2, "cut", changes)
    finished = whole.finish(limit=1)
    assert sorted(finished.result["bad_images"]) == sorted(files)
    started = cut.start()
    cut.wait_for_step(started, 22, 0)
    started.signal_group(9)
    started.wait()
    cut.assert_gone()
    cut.finish()
    helpers.assert_identical(cut.run, whole.run)


def test_more_corrupt_training_images_than_allowed(
    corrupt: tuple[Path, list[str]], places: Places, program: Any
) -> None:
    root, files = corrupt
    changed = (f"data.root={root}", "data.max_bad_fraction=0.001", "train.epochs=2")
    started = program.run(*training(*changed)(places), "--json")
    assert_refused(started, "data.max_bad_fraction", "train/", "max_bad_fraction")
    assert any(file in started.error for file in files)


def test_loss_that_is_not_finite_stops_the_run(places: Places, program: Any) -> None:
    changed = ("optim.lr=1.0e+30", "optim.warmup_epochs=0", "train.log_every=5", "checkpoint.every_steps=1")
    for nproc in (1, 2):
        run = places.folder / f"run-{nproc}"
        command = ["train", places.config, *changed, "--nproc", nproc, "--run-dir", run]
        started = program.run(*command, "--json")
        assert started.process.returncode == FAILURE, started.error
        message = started.error
        assert "NaN or infinite at step" in message
        assert "on rank" in message
        assert "checkpoint" in message and "optim.lr" in message
        assert not (run / "model.safetensors").exists()
        assert "NaN" in started.result["error"]["message"]


def test_predict_on_what_is_no_image(places: Places, program: Any, reference: Any) -> None:
    text = places.file("text.jpeg", "not a picture")
    assert_refused(program.run("predict", reference(1), text, "--json"), "image", "text.jpeg", "image file")
    missing = places.folder / "gone.png"
    assert_refused(program.run("predict", reference(1), missing, "--json"), "image", "gone.png", "image file")


def test_message_without_json_is_for_people(places: Places, program: Any) -> None:
    started = program.run(*training("train.epoch=5")(places))
    assert started.process.returncode == USER_ERROR
    assert started.output == ""
    assert started.error.count("\n") == 1
