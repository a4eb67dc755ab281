"""Invalid input gives one message with field, value and remedy, exit code 2 and no traceback; nothing is lost."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.commands import Completed, run_here
from support.paths import REPOSITORY
from support.runs import Program, Training, assert_identical, config_with, read_status

pytestmark = pytest.mark.xdist_group("runs")
USER_ERROR, FAILURE = 2, 1


@dataclass(frozen=True)
class Places:
    """Paths that the command line of a row uses."""

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
    "wrong type": (training("train.epochs=many"), "train.epochs", "many", "the default is"),
    "not key=value": (training("train.epochs"), "override", "train.epochs", "train.epochs=5"),
    "missing data folder": (training("data.root=/nowhere/at/all"), "data.root", "/nowhere/at/all", "folder"),
    "folder without splits": (_empty_folder, "data.root", "empty", "train"),
    "no data folder given": (training("data.root="), "data.root", "not set", "DL2PA_DATA"),
    "class count": (training("data.num_classes=11"), "data.num_classes", "11", "data.num_classes=10"),
    "class list lacks a folder": (_class_list, "data.classes", "'9'", "data.classes"),
    "class list missing": (training("data.classes=/no/list"), "data.classes", "/no/list", "class per line"),
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
    "word2vec with equal vectors": (
        lambda p: _class_vectors(p, np.ones((10, 4), dtype=np.float32)),
        "method.class_vectors",
        "",
        "different for all classes",
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
        "circular",
    ),
    "unknown command": (lambda p: ["trian"], "command line", "trian", "Did you mean train?"),
    "unknown option": (
        lambda p: ["train", p.config, "--epochs", 5],
        "command line",
        "--epochs",
        "train.epochs=5",
    ),
    "run directory is a file": (
        lambda p: ["train", p.config, "--run-dir", p.file("taken", "x")],
        "run-dir",
        "taken",
        "--run-dir",
    ),
    "evaluate a folder without a run": (lambda p: ["evaluate", p.digits], "run", "digits", "dl2pa train"),
    "evaluate nothing": (lambda p: ["evaluate", p.folder / "no-run"], "run", "no-run", "dl2pa train"),
    "sync a folder without a run": (lambda p: ["sync", p.digits], "run", "digits", ""),
    "export a folder without a run": (lambda p: ["export", p.digits], "run", "digits", "dl2pa train"),
    "predict without a model": (
        lambda p: ["predict", p.digits, p.file("x.jpeg")],
        "model",
        "digits",
        "finished run",
    ),
}
NO_GPU = [name for name in ROWS if name.startswith("no GPU")]


def assert_refused(done: Completed, field: str, seen: str, remedy: str) -> None:
    assert done.code == USER_ERROR, done.error
    assert "Traceback" not in done.error + done.output
    messages = [line for line in done.error.splitlines() if line.startswith("dl2pa: ")]
    assert len(messages) == 1, f"one message:\n{done.error}"
    for part in (field, seen, remedy):
        assert part in messages[0]
    error = done.result["error"]
    assert set(error) - {"place"} == {"field", "value", "message", "remedy"}
    assert field in error["field"]
    assert seen in f"{error['value']} {error['message']}"
    assert error["remedy"] and remedy in error["remedy"]


@pytest.fixture
def places(tmp_path: Path, digits: Path) -> Places:
    folder = tmp_path / 'it\'s a folder; with "quotes"'
    return Places(folder, config_with(folder, digits), digits, folder / "run")


@pytest.mark.parametrize("name", ROWS)
def test_refused(name: str, places: Places) -> None:
    if name in NO_GPU and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    command, field, seen, remedy = ROWS[name]
    assert_refused(run_here(*command(places), "--json", env={"DL2PA_DATA": ""}), field, seen, remedy)
    assert not (places.run / "checkpoints").exists() or not any((places.run / "checkpoints").iterdir())


def test_a_refused_command_exits_with_code_2(places: Places, program: Program) -> None:
    """Without --json, one line on standard error and nothing on standard output."""
    done = program.start(*training("train.epoch=5")(places)).completed()
    assert done.code == USER_ERROR
    assert done.output == ""
    assert done.error.count("\n") == 1


def test_leftover_rank_variables_are_refused(places: Places) -> None:
    done = run_here(*training()(places), "--json", env={"WORLD_SIZE": "8"})
    assert_refused(done, "environment", "WORLD_SIZE=8", "unset WORLD_SIZE")
    assert not places.run.exists()


def test_missing_processes_of_a_foreign_torchrun_are_named(places: Places, program: Program) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = {name: str(value) for name, value in ranks.items()}
    done = program.start(*training("launch.timeout_s=1")(places), "--json", env=env).completed()
    assert "waiting up to 1 s for 1 other processes" in done.error
    assert_refused(done, "environment", f"MASTER_PORT={port}", "Start all 2 processes")


HANGING_GROUP = """
import time
import torch.distributed
torch.distributed.destroy_process_group = lambda *_: time.sleep(3600)
"""


def test_error_found_by_one_rank_is_reported_by_the_command(places: Places, program: Program) -> None:
    """The launching command prints the message of the rank, also if leaving the process group hangs, as with NCCL."""
    file = sorted((places.digits / "val" / "3").iterdir())[0]
    shutil.copytree(places.digits / "val", places.folder / "val")
    bad = places.folder / "val" / "3" / file.name
    bad.write_bytes(b"no image at all")
    changed = (
        f"data.val_root={places.folder / 'val'}",
        f"data.root={places.digits / 'train'}",
        "train.max_steps=2",
    )
    places.file("sitecustomize.py", HANGING_GROUP)
    env = {"PYTHONPATH": f"{places.folder}{os.pathsep}{REPOSITORY}"}
    done = program.start(*training(*changed, nproc=2)(places), "--json", env=env).completed()
    assert_refused(done, "data.val_root", bad.name, "Restore")


def make_corrupt(root: Path) -> list[str]:
    """Damage training images. Return those that must be counted: truncated, empty, text, undecodable."""
    folders = sorted((root / "train").iterdir())
    files = [sorted(folder.iterdir())[0] for folder in folders[:4]]
    content = files[0].read_bytes()
    files[0].write_bytes(content[: len(content) // 2])
    files[1].write_bytes(b"")
    files[2].write_text("not an image\n" * 20)
    # An impossible Huffman table: the header is valid, decoding fails.
    data = bytearray(files[3].read_bytes())
    table = data.index(b"\xff\xc4")
    data[table + 5 : table + 21] = b"\xff" * 16
    files[3].write_bytes(bytes(data))
    # Damage within the compressed data: Pillow and DALI decode it with a warning, so the file is not counted. The run
    # must still finish.
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
    loader: str, corrupt: tuple[Path, list[str]], places: Places
) -> None:
    root, files = corrupt
    done = run_here(
        *training(f"data.root={root}", f"data.loader={loader}", "train.epochs=2")(places), "--json"
    )
    assert done.code == 0, done.error
    log = (places.run / "logs" / "rank-0.log").read_text()
    for file in files:
        assert log.count(f"training image {file} ") == 1, f"named once: {file}"
    assert sorted(done.result["bad_images"]) == sorted(files)
    assert done.result["steps"] == 58


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_corrupt_images_of_all_ranks_are_counted_after_a_kill(
    nproc: int, corrupt: tuple[Path, list[str]], places: Places, train: Callable[..., Training]
) -> None:
    root, files = corrupt
    changes = {"data": {"root": str(root)}, "train": {"epochs": 1}}
    whole, cut = train(nproc, "whole", changes), train(nproc, "cut", changes)
    assert sorted(whole.finish().result["bad_images"]) == sorted(files)
    started = cut.start()
    cut.wait_for_step(started, 22, 0)
    started.signal_group(9)
    started.wait()
    cut.assert_gone()
    cut.finish()
    assert_identical(cut.run, whole.run)


def test_more_corrupt_training_images_than_allowed_are_refused(
    corrupt: tuple[Path, list[str]], places: Places
) -> None:
    root, files = corrupt
    changed = (f"data.root={root}", "data.max_bad_fraction=0.001", "train.epochs=2")
    done = run_here(*training(*changed)(places), "--json")
    assert_refused(done, "data.max_bad_fraction", "train/", "max_bad_fraction")
    assert any(file in done.error for file in files)
    status = read_status(places.run)
    assert (status["state"], status["attempt"]) == ("failed", 1), "it had started, so it counts"


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_non_finite_loss_stops_the_run_with_a_remedy(nproc: int, places: Places, program: Program) -> None:
    changed = (
        "optim.lr=1.0e+30",
        "optim.warmup_epochs=0",
        "train.log_every_steps=5",
        "checkpoint.every_steps=1",
    )
    command = [*training(*changed, nproc=nproc)(places), "--json"]
    done = run_here(*command) if nproc == 1 else program.start(*command).completed()
    assert done.code == FAILURE, done.error
    for part in ("NaN or infinite at step", "on rank", "checkpoint", "optim.lr"):
        assert part in done.error
    assert not (places.run / "model.safetensors").exists()
    assert "NaN" in done.result["error"]["message"]


def test_predict_refuses_files_that_are_not_images(
    places: Places, undisturbed: Callable[..., Training]
) -> None:
    run, text = undisturbed(1, {}).run, places.file("text.jpeg", "not a picture")
    assert_refused(run_here("predict", run, text, "--json"), "image", "text.jpeg", "image file")
    missing = places.folder / "gone.png"
    assert_refused(run_here("predict", run, missing, "--json"), "image", "gone.png", "image file")
