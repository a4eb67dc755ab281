"""A user's function as the data set: paths, bytes and arrays; wrong samples are counted and named."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dl2pa.config import parse_config
from dl2pa.config.identity import check_resumable, checkpoint_identity, data_identity
from dl2pa.errors import UserError
from dl2pa.training.data import open_data
from pipelines.datasets import ImageTable, open_dataset

GRAY = np.arange(48, dtype=np.uint8).reshape(6, 8)
COLOR = np.arange(9 * 7 * 3, dtype=np.uint8).reshape(9, 7, 3)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Write the module `mine` into the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text: str) -> None:
        sys.modules.pop("mine", None)
        (tmp_path / "mine.py").write_text(text)

    yield write
    sys.modules.pop("mine", None)


def returning(monkeypatch: pytest.MonkeyPatch, samples: Any, classes: Any = ("cat", "dog")) -> None:
    """Make `mine:images` return these samples for each split."""
    holder: Any = type(sys)("mine")
    holder.images = lambda split, root: (samples, classes)
    monkeypatch.setitem(sys.modules, "mine", holder)


def opened(root: Path | None = None, split: Any = "train", **options: Any) -> ImageTable:
    table = open_dataset("mine:images", root, None, None, split, **options)
    assert isinstance(table, ImageTable)
    return table


def refused(message: str, root: Path | None = None) -> UserError:
    with pytest.raises(UserError, match=message) as caught:
        opened(root)
    assert (caught.value.field, caught.value.value) == ("data.dataset", "mine:images")
    return caught.value


def test_function_in_the_current_folder(
    module: Callable[[str], None], tmp_path: Path, picture: bytes
) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(picture)
    module(
        "def images(split, root):\n"
        "    samples = [('a.jpg', 'dog'), (root / 'b.jpg', 0)]\n"
        "    return (samples if split == 'train' else samples[:1]), ['cat', 'dog']\n"
    )
    table = opened(tmp_path)
    assert list(table.files) == ["a.jpg", "b.jpg"]
    assert (table.labels.tolist(), table.classes) == ([1, 0], ("cat", "dog"))
    assert (table.read(1), table.root, table.own) == (picture, tmp_path, None)
    assert len(opened(tmp_path, "val")) == 1


def test_bytes_arrays_and_paths_are_read_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, picture: bytes
) -> None:
    (tmp_path / "a.jpg").write_bytes(picture)
    returning(monkeypatch, [(GRAY, 0), (picture, "dog"), (COLOR, np.int64(1)), ("a.jpg", 0)])
    table = opened(tmp_path)
    assert table.labels.tolist() == [0, 1, 1, 0]
    assert [len(table.read(i)) for i in range(4)] == table.lengths.tolist()
    for i, pixels in ((0, np.repeat(GRAY[:, :, None], 3, axis=2)), (2, COLOR)):
        with Image.open(io.BytesIO(table.read(i))) as image:
            assert np.array_equal(np.asarray(image.convert("RGB")), pixels)
    assert table.read(1) == table.read(3) == picture
    assert str(table.path(2)).endswith("mine:images/train/2.bmp")
    some = pickle.loads(pickle.dumps(table.subset(np.array([3, 2]))))
    assert [some.read(i) for i in range(2)] == [table.read(3), table.read(2)]
    assert len(opened(tmp_path, imbalance=0.5)) < 4


def test_paths_inside_and_outside_the_root(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, picture: bytes
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for path in (root / "a.jpg", tmp_path / "b.jpg"):
        path.write_bytes(picture)
    paths = [("a.jpg", 0), (tmp_path / "b.jpg", 1), (str(root / "a.jpg"), 1)]
    for samples in (paths, [*paths, (picture, 0)]):
        returning(monkeypatch, samples)
        table = opened(root)
        assert all(table.read(i) == picture for i in range(len(samples)))
        assert [table.path(i) for i in range(3)] == [root / "a.jpg", tmp_path / "b.jpg", root / "a.jpg"]


def test_fingerprint_covers_contents_labels_and_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, picture: bytes
) -> None:
    (tmp_path / "a.jpg").write_bytes(picture)
    changed = COLOR.copy()
    changed[0, 0, 0] += 1
    variants = [
        [(COLOR, 0), (picture, 1)],
        [(changed, 0), (picture, 1)],
        [(COLOR, 0), (picture, 0)],
        [(picture, 1), (COLOR, 0)],
        [(COLOR, 0), (picture[:-1] + b"x", 1)],
        [("a.jpg", 0)],
        [("a.jpg", 1)],
    ]
    prints: list[str] = []
    for samples in variants:
        returning(monkeypatch, samples)
        prints.append(opened(tmp_path).fingerprint)
        assert opened(tmp_path).fingerprint == prints[-1]
    assert len(set(prints)) == len(variants)


def test_run_does_not_resume_with_other_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    tree: dict[str, Any] = {"data": {"dataset": "mine:images", "image_size": 8, "eval_resize": 8}}
    config = parse_config({**tree, "train": {"batch_size": 2}})

    def identity(*samples: Any) -> dict[str, Any]:
        returning(monkeypatch, samples)
        data = open_data(config, 1)
        return {**checkpoint_identity(config), **data_identity(data.fingerprint, data.classes)}

    before = identity((COLOR, 0), (GRAY, 1))
    check_resumable(before, identity((COLOR, 0), (GRAY, 1)))
    with pytest.raises(UserError, match="the images differ"):
        check_resumable(before, identity((COLOR, 0), (GRAY + 1, 1)))


def test_wrong_samples_are_counted_and_named_in_one_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    samples = [(COLOR, 2), (COLOR, "owl"), (COLOR, True), (COLOR / 2, 0), (3, 0), ("gone.jpg", 1)]
    samples.append((COLOR[:0], 0))
    returning(monkeypatch, samples)
    error = refused("7 samples that cannot be used", tmp_path)
    for part in (
        "label that is not among the 2 classes: 3 (sample 0: 2, sample 1: 'owl', sample 2: True)",
        "file that does not exist: 1 (sample 5: gone.jpg)",
        "array of float64 [9, 7, 3]: 1 (sample 3)",
        "array of uint8 [0, 7, 3]: 1 (sample 6)",
        "image of type int: 1 (sample 4)",
    ):
        assert part in error.message
    returning(monkeypatch, [("gone.jpg", 1)])
    refused("1 samples that cannot be used: relative path without data.root: 1")
    returning(monkeypatch, [("/gone.jpg", 1)])
    refused(r"file that does not exist: 1 \(sample 0: /gone.jpg\)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere_at_all\n", "the module nowhere_at_all is not found"),
        ("x = = 1\n", "cannot be imported"),
        ("other = 1\n", "has no attribute 'images'"),
        ("images = 1\n", "is not a function"),
        ("def images(split, root):\n    return 3\n", "does not return a sequence"),
        ("def images(split, root):\n    return [], []\n", "does not return a sequence"),
        ("def images(split, root):\n    return [], ['a', 'a']\n", "'a' appears more than once"),
        ("def images(split, root):\n    return [], ['a', 'b']\n", "has no samples"),
        (
            "def images(split, root):\n    return [3], ['a', 'b']\n",
            "samples of the split 'train' cannot be read",
        ),
        (
            "def images(split, root):\n    raise KeyError(split)\n",
            r"fails .* \(KeyError: 'train', mine.py line 2\)",
        ),
        ("def images():\n    return [], ['a', 'b']\n", r"2 were given\)"),
    ],
)
def test_wrong_functions_are_one_message(module: Callable[[str], None], text: str, message: str) -> None:
    module(text)
    refused(message)


def test_configuration_accepts_the_name_and_refuses_unused_keys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tree: dict[str, Any] = {"data": {"dataset": "mine:images", "image_size": 8, "eval_resize": 8}}
    tree |= {"train": {"batch_size": 2}, "model": {"backbone": "resnet8", "embedding_dim": 2}}
    config = parse_config(tree)
    assert config.loader == "dali"
    returning(monkeypatch, [(COLOR, 0), (GRAY, 1)])
    data = open_data(config, 1)
    assert data.classes == ("cat", "dog")
    config = parse_config({**tree, "data": {**tree["data"], "val_root": str(tmp_path)}})
    with pytest.raises(UserError, match=r"is not used by data.dataset=mine:images"):
        open_data(config, 1)
    with pytest.raises(UserError, match="not the name of a function"):
        parse_config({"data": {"dataset": "my-module:images"}})


def test_splits_with_other_classes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    holder: Any = type(sys)("mine")
    holder.images = lambda split, root: (
        [(COLOR, 0), (COLOR, 1)],
        ("a", "b") if split == "train" else ("b", "a"),
    )
    monkeypatch.setitem(sys.modules, "mine", holder)
    tree: dict[str, Any] = {"data": {"dataset": "mine:images", "image_size": 8, "eval_resize": 8}}
    with pytest.raises(UserError, match="different class names"):
        open_data(parse_config({**tree, "train": {"batch_size": 2}}), 1)
