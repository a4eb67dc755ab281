"""CIFAR-10 and CIFAR-100 from the official Python files (Krizhevsky, 2009).

The files are pickles, which can run any code when loaded. Only arrays are allowed here.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.arrays import (
    ArrayDataset,
    Split,
    array_dataset,
    damaged,
    integers,
    require,
    subfolder,
)

_ROW = 3 * 32 * 32
_SOURCE = "(the official Python version)"
_CIFAR10_ARCHIVE = f"cifar-10-python.tar.gz {_SOURCE}"
_CIFAR100_ARCHIVE = f"cifar-100-python.tar.gz {_SOURCE}"


def _latin1(text: str, encoding: str) -> bytes:
    """``codecs.encode`` restricted to the use in these files."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it requests the encoding {encoding!r}")
    return text.encode("latin1")


_KIND = re.compile(r"[biuf][1248]|[SU]\d{1,4}|O8", re.ASCII)
"""Types of the values of an array: numbers, text such as class names, and objects, which are given as a list."""


class _Kind:
    """The type of an array in place of ``numpy.dtype``, which a file could give any size and flags."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or _KIND.fullmatch(code) is None:
            raise pickle.UnpicklingError(f"it contains values of the type {code!r}")
        self._code = code
        self._order: Any = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = state[1]

    def array(self, data: Any, shape: Any, order: Any) -> Any:
        """The array of these bytes, which are text in the files of Python 2; the list itself of objects."""
        if self._code == "O8":
            if not isinstance(data, list) or shape != (len(cast(list[object], data)),):
                raise pickle.UnpicklingError("it contains an array of objects without its values")
            return cast(list[object], data)
        content = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(content, np.dtype(self._code).newbyteorder(self._order)).reshape(
            shape, order=order
        )


class _Array:
    """An array in place of ``numpy.ndarray``, whose state may claim another length than its values have."""

    def __init__(self, *_: object) -> None:
        self.values: Any = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, data = state
        self.values = kind.array(data, shape, "F" if is_fortran else "C")


def _scalar(kind: _Kind, data: Any) -> Any:
    return kind.array(data, (), "C")[()]


def _from_buffer(data: Any, kind: _Kind, shape: Any, order: Any) -> Any:
    return kind.array(data, shape, order)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    # Files that were saved again, perhaps with pickle protocol 5.
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    # Python 3 writes bytes like this at pickle protocol 2, in files that were saved again.
    ("_codecs", "encode"): _latin1,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        allowed = _ALLOWED.get((module_name, global_name))
        if allowed is None:
            raise pickle.UnpicklingError(f"it loads {module_name}.{global_name}, which is not allowed")
        return allowed


def load_cifar10(root: Path, split: Split) -> ArrayDataset:
    """CIFAR-10: 50,000 training and 10,000 test images of 32×32 pixels, 10 classes.

    Args:
        root: the folder that contains ``cifar-10-batches-py``, or that folder.
        split: ``val`` is the published test set.

    Raises:
        UserError: a file is missing, damaged, or contains more than arrays (``data.root``).
    """
    folder = subfolder(root, "cifar-10-batches-py", _CIFAR10_ARCHIVE)
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    paths = [require(root, folder / name, _CIFAR10_ARCHIVE) for name in names]
    meta = require(root, folder / "batches.meta", _CIFAR10_ARCHIVE)
    return _load(folder, paths, "labels", meta, "label_names")


def load_cifar100(root: Path, split: Split) -> ArrayDataset:
    """CIFAR-100 with its 100 fine labels: 50,000 training and 10,000 test images of 32×32 pixels.

    Args:
        root: the folder that contains ``cifar-100-python``, or that folder.
        split: ``val`` is the published test set.

    Raises:
        UserError: a file is missing, damaged, or contains more than arrays (``data.root``).
    """
    folder = subfolder(root, "cifar-100-python", _CIFAR100_ARCHIVE)
    path = require(root, folder / ("train" if split == "train" else "test"), _CIFAR100_ARCHIVE)
    meta = require(root, folder / "meta", _CIFAR100_ARCHIVE)
    return _load(folder, [path], "fine_labels", meta, "fine_label_names")


def _load(folder: Path, paths: list[Path], label_key: str, meta: Path, names_key: str) -> ArrayDataset:
    classes = tuple(_text(meta, name) for name in _field(meta, _unpickle(meta), names_key))
    batches = [_batch(path, label_key) for path in paths]
    images = np.concatenate([rows.reshape(-1, 3, 32, 32) for rows, _ in batches]).transpose(0, 2, 3, 1)
    labels = np.concatenate([labels for _, labels in batches])
    return array_dataset(images, labels, classes, folder)


def _batch(path: Path, label_key: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Rows [n, 3072] of a file (1,024 red, then green, then blue values) and labels [n]."""
    content = _unpickle(path)
    rows: object = _field(path, content, "data")
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape[1:] != (_ROW,):
        raise damaged(path, f"its 'data' is not an array of bytes of shape [n, {_ROW}]")
    values: object = _field(path, content, label_key)
    if isinstance(values, list | tuple) and any(map(_is_nested, cast(list[object], values))):
        raise damaged(path, f"its {label_key!r} are not integers")
    labels = integers(path, f"its {label_key!r}", values)
    if labels.shape != (len(rows),):
        raise damaged(path, f"it contains {len(rows):,} images and {labels.size:,} labels")
    return rows, labels


def _is_nested(label: object) -> bool:
    """Whether a label is a sequence. A small file can repeat one list so often that an array would fill the memory."""
    return isinstance(label, list | tuple | dict | _Array) or (
        isinstance(label, np.ndarray) and label.ndim > 0
    )


def _text(path: Path, name: object) -> str:
    if not isinstance(name, str | bytes):
        raise damaged(path, f"its class name {name!r} is not text")
    return name.decode("latin1") if isinstance(name, bytes) else name


def _field(path: Path, content: dict[str, Any], key: str) -> Any:
    if key not in content:
        raise damaged(path, f"it has no {key!r} field")
    return content[key]


def _check_memo(data: bytes) -> None:
    """Refuse memo indices above the file size: the unpickler allocates memory for all smaller ones."""
    for opcode, argument, _ in pickletools.genops(data):
        memoizes = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if memoizes and argument is not None and not 0 <= argument <= len(data):
            raise pickle.UnpicklingError(f"it uses the memo index {argument}")


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        _check_memo(data)
        content: object = _ArraysOnly(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # A damaged pickle can raise almost anything.
        raise damaged(path, str(error) or type(error).__name__) from error
    if not isinstance(content, dict):
        raise damaged(path, f"it contains a {type(content).__name__}, not a dictionary")
    # A file that was read with bytes as keys, and saved again.
    pairs = cast(dict[object, Any], content).items()
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): value.values
        if isinstance(value, _Array)
        else value
        for key, value in pairs
    }
