import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl2pa.errors import UserError
from pipelines.datasets import open_dataset
from pipelines.datasets.cifar import load_cifar10, load_cifar100


def rows(count: int, first: int = 0) -> np.ndarray:
    """Images with different red, green and blue planes and one value per row of pixels."""
    planes = np.arange(32, dtype=np.uint8).repeat(32)
    return np.stack([np.concatenate([planes, planes + 50, planes + 100]) + first + i for i in range(count)])


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]):
        save(folder / name, {"data": rows(2, first=10 * i), "labels": [i, 9], "filenames": ["a", "b"]})
    save(folder / "batches.meta", {"label_names": [f"class{i}" for i in range(10)]})
    return folder


def save(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def refused(root: Path, words: str, load: Callable[..., Any] = load_cifar10) -> UserError:
    with pytest.raises(UserError, match=words) as caught:
        load(root, "train")
    assert caught.value.field == "data.root"
    return caught.value


def test_cifar10_joins_its_batches_in_order(cifar10: Path) -> None:
    dataset = load_cifar10(cifar10.parent, "train")
    assert dataset.images.shape == (10, 32, 32, 3)
    assert dataset.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert dataset.images[0, 5, 7].tolist() == [5, 55, 105]
    assert dataset.images[9, 5, 7].tolist() == [46, 96, 146]
    assert dataset.classes == tuple(f"class{i}" for i in range(10))


def test_validation_split_is_the_test_batch(cifar10: Path) -> None:
    dataset = load_cifar10(cifar10, "val")
    assert dataset.labels.tolist() == [5, 9]


def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, first in (("train", 0), ("test", 7)):
        save(folder / name, {"data": rows(2, first), "fine_labels": [1, 2], "coarse_labels": [0, 0]})
    save(folder / "meta", {"fine_label_names": ["apple", "bee", "cat"], "coarse_label_names": ["thing"]})
    train, val = load_cifar100(tmp_path, "train"), load_cifar100(folder, "val")
    assert train.classes == val.classes == ("apple", "bee", "cat")
    assert train.labels.tolist() == val.labels.tolist() == [1, 2]
    assert train.images[0, 5, 7].tolist() == [5, 55, 105]
    assert val.images[0, 5, 7].tolist() == [12, 62, 112]


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickle_that_runs_a_command_is_refused(cifar10: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    save(cifar10 / "data_batch_3", {"data": Malicious(f"touch '{trace}'"), "labels": [0]})
    error = refused(cifar10, r"it loads (posix|nt)\.system")
    assert error.value == str(cifar10 / "data_batch_3")
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "numpy load", "numpy.core.multiarray frombuffer", "_codecs decode"]
)
def test_other_globals_are_refused(cifar10: Path, name: str) -> None:
    module, function = name.split()
    (cifar10 / "batches.meta").write_bytes(f"c{module}\n{function}\n(S'1'\ntR.".encode())
    refused(cifar10, f"it loads {module}.{function}")


def test_files_of_python_3_and_numpy_1_can_be_read(cifar10: Path) -> None:
    path = cifar10 / "test_batch"
    content = path.read_bytes()
    assert b"_codecs" in content
    path.write_bytes(content.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    assert load_cifar10(cifar10, "val").images[0, 0, 0].tolist() == [50, 100, 150]


def bytes_keys(content: dict[str, Any]) -> dict[bytes, Any]:
    """The content as it is after loading it with ``encoding="bytes"``."""
    return {
        key.encode(): [v.encode() if isinstance(v, str) else v for v in value]
        if isinstance(value, list)
        else value
        for key, value in content.items()
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("change", [dict, bytes_keys])
def test_files_that_were_saved_again(cifar10: Path, protocol: int, change: Callable[..., Any]) -> None:
    expected = load_cifar10(cifar10, "val")
    for path in cifar10.iterdir():
        content = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(change(content), protocol=protocol))
    dataset = load_cifar10(cifar10, "val")
    assert (dataset.classes, dataset.fingerprint) == (expected.classes, expected.fingerprint)


@pytest.mark.parametrize("protocol", [2, 5])
def test_labels_may_be_stored_as_numpy_numbers(cifar10: Path, protocol: int) -> None:
    for labels in (np.array([3, 4]), [np.int64(3), np.int64(4)], [3.0, 4.0]):
        content = pickle.dumps({"data": rows(2), "labels": labels}, protocol=protocol)
        (cifar10 / "test_batch").write_bytes(content)
        assert load_cifar10(cifar10, "val").labels.tolist() == [3, 4]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_class_names_may_be_an_array_of_objects(cifar10: Path, protocol: int) -> None:
    names = load_cifar10(cifar10, "train").classes
    content = {"label_names": np.array(names, dtype=object), "of": np.array([[1, "x"]], dtype=object)[0]}
    (cifar10 / "batches.meta").write_bytes(pickle.dumps(content, protocol=protocol))
    assert load_cifar10(cifar10, "train").classes == names


class Pickled:
    """An object that is pickled as a call, and a state that is set after it."""

    def __init__(self, function: Any, arguments: tuple[Any, ...], state: Any = None) -> None:
        self.call = function, arguments, state

    def __reduce__(self) -> Any:
        return self.call


RECONSTRUCT: Any = np.empty(0).__reduce__()[0]
SCALAR: Any = np.int64(0).__reduce__()[0]


def test_arrays_of_python_2_can_be_read(cifar10: Path) -> None:
    """Their bytes are text after loading."""
    expected, data = load_cifar10(cifar10, "val"), rows(2, 50)
    state = (1, data.shape, data.dtype, False, data.tobytes().decode("latin1"))
    array = Pickled(RECONSTRUCT, (np.ndarray, (0,), "b"), state)
    labels = expected.labels[:2].tolist()
    (cifar10 / "test_batch").write_bytes(pickle.dumps({"data": array, "labels": labels}, protocol=2))
    images = load_cifar10(cifar10, "val").images
    assert (
        images.tobytes() == np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)).tobytes()
    )


LIST = [[[[[[1] * 30] * 30] * 30] * 30] * 30] * 30
"""729 million numbers as an array; the file contains 180."""


@pytest.mark.parametrize(
    "labels",
    [
        Pickled(np.ndarray, ((10**12,), np.dtype("u1"))),
        Pickled(RECONSTRUCT, (np.ndarray, (10**12,), b"b")),
        Pickled(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (10**9,), np.dtype("O"), False, [1])),
        Pickled(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (10**9,), np.dtype("u1"), False, b"\1\2")),
        [Pickled(SCALAR, (np.dtype("V1000000000"),))],
        LIST,
    ],
    ids=["ndarray", "reconstruct", "objects", "short", "scalar", "list"],
)
def test_arrays_without_their_values_take_no_memory(cifar10: Path, labels: Any) -> None:
    """An array of objects with too few values ended the process."""
    save(cifar10 / "data_batch_2", {"data": rows(2), "labels": labels})
    refused(cifar10, "cannot be used")


def test_damaged_files(cifar10: Path) -> None:
    path = cifar10 / "data_batch_2"
    path.write_bytes(path.read_bytes()[:1000])
    assert "Download" in refused(cifar10, "cannot be used").remedy
    path.write_bytes(b"<html>404</html>")
    refused(cifar10, "cannot be used")
    path.write_bytes(b"")
    refused(cifar10, "cannot be used")
    for content, words in [
        ([1, 2], "contains a list"),
        ({"labels": [0]}, "no 'data'"),
        ({"data": rows(2)}, "no 'labels'"),
        ({"data": rows(2), "labels": [0]}, "2 images and 1 labels"),
        ({"data": rows(2), "labels": ["cat", "dog"]}, "not integers"),
        ({"data": rows(2), "labels": [0.5, 1.5]}, "not integers"),
        ({"data": rows(2), "labels": [True, False]}, "not integers"),
        ({"data": rows(2).astype(np.float32), "labels": [0, 1]}, "not an array of bytes"),
        ({"data": rows(2)[:, :100], "labels": [0, 1]}, "not an array of bytes"),
        ({"data": rows(2), "labels": [0, 10]}, "from 0 to 10"),
    ]:
        save(path, content)
        refused(cifar10, words)


def test_missing_files(cifar10: Path, tmp_path: Path) -> None:
    refused(tmp_path / "absent", "does not exist")
    refused(cifar10 / "test_batch", "not a directory")
    (cifar10 / "data_batch_4").unlink()
    error = refused(tmp_path, "no file .*data_batch_4")
    assert error.value == str(tmp_path)
    assert "cifar-10-python.tar.gz" in error.remedy
    assert "cifar-100-python.tar.gz" in refused(tmp_path, "no file .*train", load_cifar100).remedy


@pytest.mark.thorough  # unpacking the published files takes half a minute; those above have the same format
def test_published_cifar100(cifar100_root: Path, shared_data: Callable[[str], Path]) -> None:
    train = load_cifar100(cifar100_root, "train")
    val = load_cifar100(cifar100_root / "cifar-100-python", "val")
    assert (train.images.shape, val.images.shape) == ((50_000, 32, 32, 3), (10_000, 32, 32, 3))
    assert np.bincount(train.labels).tolist() == [500] * 100
    assert np.bincount(val.labels).tolist() == [100] * 100
    assert train.classes == val.classes == tuple(shared_data("cifar100/classes.txt").read_text().split())
    assert train.fingerprint != val.fingerprint
    # The published mean color; swapped planes would give another one.
    mean = train.images.reshape(-1, 3).mean(axis=0) / 255
    assert mean.round(4).tolist() == [0.5071, 0.4865, 0.4409]


@pytest.mark.thorough  # test_longtail.py has the same totals, without the published files
@pytest.mark.parametrize(("imbalance", "total"), [(0.005, 9_502), (0.01, 10_847), (0.02, 12_608)])
def test_cifar100_lt_has_the_published_total_and_full_test_set(
    cifar100_root: Path, imbalance: float, total: int
) -> None:
    train, val = (
        open_dataset("cifar100", cifar100_root, None, None, split, imbalance) for split in ("train", "val")
    )
    assert len(train) == total
    assert np.bincount(val.labels).tolist() == [100] * 100
