"""`dl2pa features`: content, resume, PCA, and the errors of folders that are damaged or incomplete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from dl2pa.backbones.vectors import FrozenBackbone
from dl2pa.config import Config
from dl2pa.errors import UserError
from dl2pa.features import extract
from dl2pa.features import write as writer
from dl2pa.features.project import project_features
from dl2pa.model.compose import load_frozen
from dl2pa.model.model import build_configured_embedder
from dl2pa.training.data import build_subset_pipeline, open_split
from pipelines.datasets.features import SPLITS, FeatureFolder, load_features

Write = Callable[..., dict[str, Any]]


def image_batch(config: Config, split: Any) -> torch.Tensor:
    dataset = open_split(config, split)
    samples = tuple(range(len(dataset.labels)))  # pyright: ignore
    pipeline = build_subset_pipeline(config, dataset, samples, len(samples), torch.device("cpu"), 1)
    (batch,) = list(pipeline)
    return batch.images


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".npy", ".safetensors")
    }


def test_features_are_those_of_the_network_in_evaluation_mode(
    folder: Path, settings: Callable[..., Config]
) -> None:
    config = settings()
    torch.manual_seed(config.train.seed)
    network = build_configured_embedder(config).backbone.eval()
    for split in SPLITS:
        dataset = load_features(folder, split)
        images = open_split(config, split)
        with torch.no_grad():
            expected = network(image_batch(config, split))
        assert torch.allclose(torch.from_numpy(dataset.features), expected, atol=1e-5)
        assert np.array_equal(dataset.labels, images.labels)  # pyright: ignore
        assert dataset.classes == tuple(images.classes)
    assert not FeatureFolder(folder).parts.exists()


def test_initial_weights_are_used_and_recorded(
    tmp_path: Path, write: Write, settings: Callable[..., Config], folder: Path
) -> None:
    torch.manual_seed(5)
    torch.save(build_configured_embedder(settings()).state_dict(), tmp_path / "weights.pt")
    record = write(tmp_path / "f", model={"init": str(tmp_path / "weights.pt")})
    assert record["init"]["source"] == str(tmp_path / "weights.pt")
    one, other = (load_features(place, "train") for place in (tmp_path / "f", folder))
    assert not np.allclose(one.features, other.features)
    assert one.fingerprint != other.fingerprint


def test_a_stopped_pass_continues_with_the_same_bytes(
    tmp_path: Path, write: Write, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "_IMAGES", 8)  # 3 chunks of training images, 2 of validation images
    original, written = extract._write, list[Path]()  # pyright: ignore[reportPrivateUsage]

    def stop_at_third(path: Path, rows: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        original(path, rows)

    monkeypatch.setattr(extract, "_write", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "f")
    with pytest.raises(UserError, match="is not complete"):
        load_features(tmp_path / "f", "train")
    before = {path: path.stat().st_mtime_ns for path in written}

    def count(path: Path, rows: Any) -> None:
        assert path not in before, "a finished chunk is not computed again"
        written.append(path)
        original(path, rows)

    monkeypatch.setattr(extract, "_write", count)
    write(tmp_path / "f")
    assert len(written) == 5
    assert contents(tmp_path / "f") == contents(folder)


def test_the_division_among_processes_changes_no_byte(
    tmp_path: Path, write: Write, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "_IMAGES", 4)

    def divide(work: Callable[[extract.Task], None], tasks: list[extract.Task], workers: int) -> list[None]:
        (task,) = tasks
        parts = [{split: chunks[rank::3] for split, chunks in task.chunks.items()} for rank in (2, 0, 1)]
        return [work(extract.Task(**{**vars(task), "chunks": part})) for part in parts]

    monkeypatch.setattr(writer, "in_parallel", divide)
    write(tmp_path / "f")
    assert contents(tmp_path / "f") == contents(folder)


def test_a_complete_folder_is_kept_and_another_configuration_is_refused(
    tmp_path: Path, write: Write, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "f")
    monkeypatch.setattr(writer, "_compute", lambda *_: pytest.fail("nothing is left to compute"))
    assert write(tmp_path / "f")["complete"]
    with pytest.raises(UserError, match=r"data.image_size is 16 now and was 12") as caught:
        write(tmp_path / "f", data={"image_size": 16})
    assert caught.value.field == "--out"
    with pytest.raises(UserError, match="--pca is 2 now"):
        write(tmp_path / "f", pca=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(UserError, match=r"notes.txt"):
        write(tmp_path / "other")


def test_pca_is_that_of_the_training_features(tmp_path: Path, write: Write, folder: Path) -> None:
    record = write(tmp_path / "f", pca=3)
    expected = PCA(3).fit(load_features(folder, "train").features.astype(np.float64))
    assert record["network"]["pca"]["explained"] == pytest.approx(expected.explained_variance_ratio_.sum())
    for split in SPLITS:
        projected = expected.transform(load_features(folder, split).features.astype(np.float64))
        stored = load_features(tmp_path / "f", split).features
        assert stored.shape[1] == 3
        assert np.allclose(np.abs(stored), np.abs(projected), atol=1e-4)


def test_pca_of_existing_features_equals_pca_with_the_pass(
    tmp_path: Path, write: Write, folder: Path
) -> None:
    write(tmp_path / "f", pca=3)
    record = project_features(folder, tmp_path / "g", 3, "float32")
    assert contents(tmp_path / "g") == contents(tmp_path / "f")
    assert record["network"] == FeatureFolder(tmp_path / "f").read_complete()["network"]
    with pytest.raises(UserError, match="principal components"):
        project_features(tmp_path / "g", tmp_path / "h", 2, "float32")
    with pytest.raises(UserError, match="not empty"):
        project_features(folder, tmp_path / "f", 3, "float32")


@pytest.mark.parametrize("pca", [None, 3])
def test_the_frozen_network_of_a_folder_computes_its_features(
    pca: int | None, tmp_path: Path, write: Write, settings: Callable[..., Config]
) -> None:
    write(tmp_path / "f", "float16", pca)
    features = load_frozen(FeatureFolder(tmp_path / "f"))(image_batch(settings(), "val"))
    stored = load_features(tmp_path / "f", "val").features
    assert stored.dtype == np.float16
    assert torch.allclose(features, torch.from_numpy(stored).float(), atol=2e-3, rtol=2e-3)


def test_small_arrays_are_enlarged_to_the_image_size(
    tmp_path: Path, write: Write, settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for CIFAR, whose images have a size of their own."""
    original = extract.build_subset_pipeline
    seen = list[torch.Size]()

    def small(config: Config, *arguments: Any, **options: Any) -> Any:
        small_data = config.data.model_copy(update={"image_size": 6})
        return original(config.model_copy(update={"data": small_data}), *arguments, **options)

    class Watched(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images.shape)
            return images.mean(dim=(2, 3))

    monkeypatch.setattr(extract, "build_subset_pipeline", small)
    monkeypatch.setattr(extract, "load_network", lambda *_: FrozenBackbone(Watched()))
    (tmp_path / "parts").mkdir()
    task = extract.Task(settings(), FeatureFolder(tmp_path), {}, 4, {"train": (), "val": (0,)}, "cpu", 1)
    extract.compute(task)
    assert set(seen) == {torch.Size((4, 3, 12, 12))}


def test_unreadable_training_images_are_left_out_up_to_the_limit(
    tmp_path: Path, write: Write, images: Path
) -> None:
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/train/class1/3.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 100)
    data = {"root": str(tmp_path / "images"), "loader": "torchvision", "eval_resize": 12}
    record = write(tmp_path / "f", data={**data, "max_bad_fraction": 0.01})  # at least one image
    assert record["splits"]["train"]["skipped"] == 1
    labels = load_features(tmp_path / "f", "train").labels
    assert np.bincount(labels).tolist() == [8, 7, 8]
    with pytest.raises(UserError) as caught:
        write(tmp_path / "g", data={**data, "max_bad_fraction": 0.0})
    assert (caught.value.field, "unreadable training images" in caught.value.message) == (
        "data.max_bad_fraction",
        True,
    )


def damage(folder: Path, name: str) -> None:
    path = folder / name
    if name == "features.json":
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "format": "dl2pa-features-9"}))
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["train_features.npy", "train_labels.npy", "features.json"])
def test_a_changed_file_is_refused(name: str, tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "f")
    damage(tmp_path / "f", name)
    with pytest.raises(UserError) as caught:
        load_features(tmp_path / "f", "train")
    assert caught.value.field == "data.root"
    assert "dl2pa features" in str(caught.value.remedy)


def test_changed_weights_of_the_network_are_refused(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "f")
    damage(tmp_path / "f", "backbone.safetensors")
    with pytest.raises(UserError, match="recorded hash"):
        load_frozen(FeatureFolder(tmp_path / "f"))


@pytest.mark.parametrize("pca", [0, 9])
def test_an_impossible_number_of_components_is_refused(pca: int, tmp_path: Path, write: Write) -> None:
    with pytest.raises(UserError, match="have 8 features each") as caught:
        write(tmp_path / "f", pca=pca)
    assert caught.value.field == "--pca"
    assert not (tmp_path / "f").exists()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_features_beyond_float16_are_refused(
    tmp_path: Path, write: Write, settings: Callable[..., Config]
) -> None:
    embedder = build_configured_embedder(settings())
    state = {k: 1e4 * v if k.endswith("bn1.bias") else v for k, v in embedder.state_dict().items()}
    state = {k: v + 1e6 if k == "backbone.blocks.2.bn2.bias" else v for k, v in state.items()}
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="--dtype float32"):
        write(tmp_path / "f", "float16", model={"init": str(tmp_path / "weights.pt")})
