"""A user's own table of images: `data.dataset=package.module:function`.

The function is called once per split and process with the name of the split (``train`` or ``val``) and `data.root` (a
Path, or None), and returns the samples and the class names in label order::

    def birds(split: str, root: Path | None) -> tuple[Sequence[tuple[image, label]], Sequence[str]]

An image is the path of a file (relative to `root`, or absolute), the bytes of an encoded image, or a uint8 array of
shape [H, W, 3] or [H, W]. A label is the position of the class or its name. The same call must return the same samples
in the same order. They are read once from the first to the last when the data set is opened, and then by position.
"""

from __future__ import annotations

import hashlib
import operator
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets.arrays import Split
from pipelines.datasets.lists import MISSING, file_lengths
from pipelines.datasets.skipped import SkippedFiles
from pipelines.datasets.table import ImageTable, PathTable
from pipelines.images import encode_bmp, image_suffix, read_image_file, size_of_bmp

_CONTRACT = "It returns (samples, class names); see docs/data.md."
_FIELD = "data.dataset"


@dataclass(frozen=True, eq=False)
class OwnImages:
    """Images of a user's table, by position.

    Attributes:
        samples: what the function returned, or the same pairs as a list.
        root: the folder of relative paths.
        digest: of the contents of the images.
    """

    samples: Sequence[Any]
    root: str
    digest: str
    selection: NDArray[np.int64] | None = None

    def subset(self, samples: NDArray[np.int64]) -> OwnImages:
        """The images ``samples`` [M] in that order."""
        chosen = samples if self.selection is None else self.selection[samples]
        return OwnImages(self.samples, self.root, self.digest, chosen)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets the images of the selection, not the user's object."""
        chosen = range(len(self.samples)) if self.selection is None else self.selection.tolist()
        return OwnImages, ([(self.samples[i][0], 0) for i in chosen], self.root, self.digest)

    def read(self, i: int) -> bytes:
        """The encoded bytes of image `i`.

        Raises:
            OSError: its file cannot be read.
            BadImage: it is not a regular file, or has more than 256 MiB.
        """
        image = self.samples[i if self.selection is None else self.selection.item(i)][0]
        if isinstance(image, str | Path):
            return read_image_file(os.path.join(self.root, image))  # noqa: PTH118
        return encode_bmp(_pixels(image)) if _is_array(image) else bytes(image)


def open_own(name: str, root: Path | None, split: Split) -> ImageTable:
    """Open a split of a user's table.

    Raises:
        UserError: the function cannot be imported or fails, or returns samples that cannot be used; all of them are
            counted in one message (``data.dataset``).
    """
    samples, classes = _call(name, _find(name), split, root)
    images: list[Any] = []
    labels: list[Any] = []
    try:
        for image, label in samples:
            # Bytes and pixels stay in the user's object; only their properties are kept.
            images.append(str(image) if isinstance(image, str | Path) else _properties(image))
            labels.append(label)
    except Exception as error:
        raise _failed(name, error, f"the samples of the split {split!r} cannot be read") from None
    problems = SkippedFiles()
    numbers = _numbers(labels, classes, problems)
    table = _table_of(name, split, root, samples, images, numbers, classes, problems)
    if problems.total:
        message = f"the split {split!r} has {problems.total:,} samples that cannot be used: {problems}"
        raise UserError(_FIELD, name, message, f"Correct the function. {_CONTRACT}")
    if not len(table):
        raise UserError(
            _FIELD, name, f"the split {split!r} has no samples", f"Correct the function. {_CONTRACT}"
        )
    return table


@dataclass(frozen=True)
class _Properties:
    """Length of an image in bytes, digest of its content and suffix of its format; a reason if it cannot be used."""

    length: int = 0
    digest: bytes = b""
    suffix: str = ""
    problem: str = ""


def _properties(image: Any) -> _Properties:
    if _is_array(image):
        color = image.ndim == 3 and image.shape[2] == 3
        if image.dtype != np.uint8 or not (color or image.ndim == 2) or not image.size:
            return _Properties(problem=f"array of {image.dtype} {list(image.shape)}")
        content = hashlib.sha256(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes()).digest()
        return _Properties(size_of_bmp(*image.shape[:2]), content, "bmp")
    if isinstance(image, bytes | bytearray | memoryview):
        data = bytes(image)
        return _Properties(len(data), hashlib.sha256(data).digest(), image_suffix(data) or "jpg")
    return _Properties(problem=f"image of type {type(image).__name__}")


def _is_array(image: Any) -> bool:
    return isinstance(image, np.ndarray)


def _pixels(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 3] of an array [H, W, 3] or [H, W]."""
    return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)


def _numbers(labels: list[Any], classes: tuple[str, ...], problems: SkippedFiles) -> NDArray[np.int64]:
    """Positions of the classes, int64 [N]; wrong labels are counted and get 0."""
    position_of = {name: k for k, name in enumerate(classes)}
    numbers = np.zeros(len(labels), dtype=np.int64)
    for i, label in enumerate(labels):
        number = position_of.get(label) if isinstance(label, str) else _index(label)
        if number is None or not 0 <= number < len(classes):
            problems.add(
                f"label that is not among the {len(classes):,} classes", f"sample {i}: {label!r}"[:80]
            )
        else:
            numbers[i] = number
    return numbers


def _index(label: Any) -> int | None:
    try:
        return None if isinstance(label, bool) else operator.index(label)
    except TypeError:
        return None


def _table_of(
    name: str,
    split: Split,
    root: Path | None,
    samples: Sequence[Any],
    images: list[str | _Properties],
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    problems: SkippedFiles,
) -> ImageTable:
    """Table of the samples; problems of the images are counted."""
    base = home = os.path.abspath(root) if root is not None else "/"  # noqa: PTH100
    where = [i for i, image in enumerate(images) if isinstance(image, str)]
    paths = [str(images[i]) for i in where]
    relative = [root is None and not path.startswith("/") for path in paths]
    if any(os.path.isabs(path) and not path.startswith(f"{base}/") for path in paths):  # noqa: PTH117
        paths, base = [os.path.join(base, path) for path in paths], "/"  # noqa: PTH118
    paths = [path[len(base) :].lstrip("/") if path.startswith("/") else path for path in paths]
    lengths = np.array([0 if isinstance(image, str) else image.length for image in images], np.int64)
    lengths[where] = found = file_lengths(base.rstrip("/"), paths)
    for k in np.flatnonzero(found < 0).tolist():
        reason = "relative path without data.root" if relative[k] else MISSING
        problems.add(reason, f"sample {where[k]}: {images[where[k]]}")
    for i, image in enumerate(images):
        if not isinstance(image, str) and image.problem:
            problems.add(image.problem, f"sample {i}")
    if len(paths) == len(images):
        return ImageTable.of(Path(base), PathTable.of(paths), lengths, labels, classes)
    names = dict(zip(where, paths, strict=True))
    digest = hashlib.sha256()
    for i, image in enumerate(images):
        digest.update(image.encode("utf-8", "surrogateescape") if isinstance(image, str) else image.digest)
        if not isinstance(image, str):
            names[i] = f"{name}/{split}/{i}.{image.suffix}"
    own = OwnImages(samples, home, digest.hexdigest())
    files = PathTable.of(names[i] for i in range(len(images)))
    return ImageTable.of(Path(base), files, lengths, labels, classes, own=own)


def _find(name: str) -> Callable[..., Any]:
    """The function; modules in the current folder are found too."""
    module_name, _, function_name = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        function: Any = import_module(module_name)
        for part in function_name.split("."):
            function = getattr(function, part)
    except ModuleNotFoundError as error:
        message = f"the module {error.name} is not found"
        remedy = "Start in the folder that contains it, or add this folder to PYTHONPATH."
        raise UserError(_FIELD, name, message, remedy) from None
    except AttributeError as error:
        raise UserError(
            _FIELD, name, f"is not found ({error})", "Correct the name of the function."
        ) from None
    except Exception as error:
        raise _failed(name, error, "the module cannot be imported") from None
    if not callable(function):
        raise UserError(_FIELD, name, "is not a function", f"Specify a function. {_CONTRACT}")
    return function


def _call(
    name: str, function: Callable[..., Any], split: Split, root: Path | None
) -> tuple[Sequence[Any], tuple[str, ...]]:
    try:
        result = function(split, root)
    except UserError:
        raise
    except Exception as error:
        raise _failed(name, error, f"the function fails for the split {split!r}") from None
    classes: tuple[Any, ...] = ()
    try:
        samples, names = result
        len(samples)
        classes = () if isinstance(names, str) else tuple(names)
    except (TypeError, ValueError):
        samples = ()
    if not classes or not all(isinstance(each, str) for each in classes):
        message = "does not return a sequence of samples and a sequence of class names"
        raise UserError(_FIELD, name, message, f"Correct the function. {_CONTRACT}")
    if len(set(classes)) != len(classes):
        repeated = next(each for k, each in enumerate(classes) if each in classes[:k])
        raise UserError(
            _FIELD, name, f"the class {repeated!r} appears more than once", "List each class once."
        )
    return samples, classes


def _failed(name: str, error: Exception, what: str) -> UserError:
    """The error for an exception of the user's code, with the place that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    called = [frame for frame in last if frame.filename != __file__]  # not a call with wrong arguments
    place = f", {Path(called[0].filename).name} line {called[0].lineno}" if called else ""
    message = f"{what} ({type(error).__name__}: {error}{place})"
    return UserError(_FIELD, name, message, "Correct the function, or install what it needs.")
