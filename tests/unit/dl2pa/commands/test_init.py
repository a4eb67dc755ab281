"""`dl2pa init` writes a configuration that `dl2pa train` accepts, and reports what it found."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from dl2pa import gpus
from dl2pa.config import load_config
from dl2pa.runplan import RunSpec, check_initial_weights, check_trainings, plan_runs
from dl2pa.training.data import open_split
from pipelines.datasets import ImageTable
from pipelines.encoded import FaultLimits
from support.commands import Completed, run_here

Folder = Callable[..., Path]


def jpeg(size: tuple[int, int] = (40, 30), orientation: int | None = None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8))
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.fixture
def pets(tmp_path: Path) -> Folder:
    """Write a data set of two classes: ``pets("train", "val")`` has these splits, ``pets()`` class folders."""

    def write(*splits: str, count: int = 10) -> Path:
        for split in splits or ("",):
            for name in ("cat", "dog"):
                folder = tmp_path / "pets" / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    (folder / f"{i}.jpg").write_bytes(jpeg())
        return tmp_path / "pets"

    return write


@pytest.fixture(autouse=True)
def cpu_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU, and no weights in the cache."""
    monkeypatch.setattr(gpus, "visible_gpus", list)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))


def init(folder: Path, *arguments: object) -> Completed:
    return run_here("init", folder, *arguments, folder=folder.parent)


def written(folder: Path, *arguments: object) -> dict[str, Any]:
    """Result of a successful call whose file passes the checks before a training."""
    done = init(folder, *arguments, "--json")
    assert done.code == 0, done.error
    (plan,) = plan_runs([RunSpec(folder.parent / done.result["config"], ())], folder.parent / "run")
    check_trainings([(plan.config, plan.nproc)])
    if not any("fetch" in step for step in done.result["next"]):
        check_initial_weights([plan])
    return done.result


def refused(done: Completed, field: str, words: str) -> None:
    assert done.code == 2, done.error
    error = done.result["error"]
    assert (error["field"], words in error["message"]) == (field, True), error


def test_class_folders_get_a_validation_split(pets: Folder) -> None:
    root = pets()
    result = written(root, "--init", "none")
    assert (result["train_images"], result["val_images"], result["val_fraction"]) == (16, 4, 0.2)
    assert (result["classes"], result["inspected"], result["median_short_side"]) == (2, 20, 30)
    assert (result["unreadable"], result["warnings"]) == ([], [])
    assert result["next"] == ["dl2pa train pets.yaml"]
    config = load_config(root.parent / "pets.yaml")
    assert (config.data.root, config.data.num_classes, config.model.init) == (str(root), 2, None)


@pytest.mark.parametrize(
    ("splits", "roots"),
    [
        (("train",), ("", None, 0.2)),
        (("train", "val"), ("", None, None)),
        (("train", "validation"), ("train", "validation", None)),
        (("train", "test", "valid"), ("train", "valid", None)),
    ],
)
def test_existing_splits_are_used(
    pets: Folder, splits: tuple[str, ...], roots: tuple[str, str | None, float | None]
) -> None:
    root = pets(*splits)
    result = written(root, "--init", "none")
    data = load_config(root.parent / "pets.yaml").data
    assert data.root == os.path.normpath(root / roots[0])
    assert data.val_root == (roots[1] and str(root / roots[1]))
    assert data.val_fraction == roots[2]
    assert result["val_images"] == (4 if roots[2] else 20)


def test_unreadable_rotated_and_skipped_files_are_reported(pets: Folder) -> None:
    root = pets()
    (root / "cat" / "3.jpg").write_bytes(b"no image")
    (root / "dog" / "3.jpg").write_bytes(jpeg(orientation=6))
    (root / "dog" / "phone.heic").write_bytes(b"")
    result = written(root, "--init", "none")
    assert [Path(one["path"]).name for one in result["unreadable"]] == ["3.jpg"]
    assert [any(word in text for text in result["warnings"]) for word in ("read", "orientation", "HEIC")] == [
        True
    ] * 3
    data = load_config(root.parent / "pets.yaml").data
    assert 0.05 < data.max_bad_fraction < 0.5
    plain = init(root, "--init", "none", "--force")
    assert "3.jpg: is not an image" in plain.error


def test_training_and_validation_accept_the_unreadable_images_that_were_found(pets: Folder) -> None:
    root = pets(count=50)
    result = written(root, "--init", "none")
    val = open_split(load_config(root.parent / "pets.yaml"), "val")
    assert isinstance(val, ImageTable)
    for i in (0, -1):
        val.path(range(len(val))[i]).write_bytes(b"no image")
    result = written(root, "--init", "none", "--force")
    assert (result["val_images"], len(result["unreadable"])) == (20, 2)
    data = load_config(root.parent / "pets.yaml").data
    limits = FaultLimits(data.max_bad_fraction, data.max_bad_val_fraction)
    assert limits.allowed(20, train=False) >= 2
    assert data.max_bad_val_fraction <= 0.5


def test_an_existing_file_needs_force(pets: Folder) -> None:
    root = pets()
    file = root.parent / "mine.yaml"
    file.write_text("precious")
    refused(init(root, "--init", "none", "--out", file, "--json"), "--out", "already exists")
    assert file.read_text() == "precious"
    assert init(root, "--init", "none", "--out", file, "--force").code == 0
    assert "precious" not in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "field", "words"),
    [
        (("gone",), "DIR", "does not exist"),
        (("empty",), "DIR", "no class folders"),
        (("single",), "DIR", "one class folder"),
        (("only", "--init", "none"), "DIR", "no folder 'train'"),
        (("pets", "--val-fraction", "1.5"), "--val-fraction", "is not between"),
        (("pets", "--init", "gone.pt"), "--init", "no such file"),
        (("pets", "--init", "resnet18"), "--init", "is the name of a network"),
        (("pets", "--backbone", "resnet19"), "--backbone", "is not a known backbone"),
        (("pets", "--backbone", "identity"), "--backbone", "takes features, not images"),
        (("pets", "--out", "pets"), "--out", "is a folder"),
    ],
)
def test_invalid_input_writes_nothing(
    pets: Folder, tmp_path: Path, arguments: tuple[str, ...], field: str, words: str
) -> None:
    pets()
    (tmp_path / "empty").mkdir()
    for name in ("single/cat", "only/val/cat"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.jpg").write_bytes(jpeg())
    refused(run_here("init", *arguments, "--json", folder=tmp_path), field, words)
    assert not list(tmp_path.glob("*.yaml"))


def test_the_default_names_weights_to_fetch(pets: Folder) -> None:
    root = pets()
    result = written(root)
    fetch, train = result["next"]
    assert (fetch, train) == (
        "dl2pa weights fetch torchvision:mobilenet_v3_large.IMAGENET1K_V2",
        "dl2pa train pets.yaml",
    )
    assert fetch in (root.parent / "pets.yaml").read_text()


def test_weights_in_the_cache_are_preferred(pets: Folder, tmp_path: Path) -> None:
    root = pets()
    place = tmp_path / "hub/hub/checkpoints"
    place.mkdir(parents=True)
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    torch.save(torchvision.models.resnet18().state_dict(), place / url.rpartition("/")[2])
    result = written(root)
    assert (result["backbone"], result["init"]) == ("resnet18", "torchvision:IMAGENET1K_V1")
    assert result["next"] == ["dl2pa train pets.yaml"]


def test_a_file_of_weights_needs_its_backbone(pets: Folder, tmp_path: Path) -> None:
    root = pets()
    file = tmp_path / "weights.safetensors"
    save_file(torchvision.models.mobilenet_v3_small().state_dict(), file)
    refused(init(root, "--init", file, "--json"), "--init", "does not record its backbone")
    refused(init(root, "--init", file, "--backbone", "resnet18", "--json"), "--init", "")
    result = written(root, "--init", file, "--backbone", "mobilenet_v3_small")
    assert (result["backbone"], result["init"]) == ("mobilenet_v3_small", str(file))
