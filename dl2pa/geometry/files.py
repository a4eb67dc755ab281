"""Prototypes on disk: ours (checksum and certificate), a plain array, or the DL2PA authors' state dict."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dl2pa.errors import UserError
from dl2pa.geometry.certificate import Certificate, certify, mean_norm
from dl2pa.geometry.prototypes import Prototypes, check_shape
from dl2pa.osutil import follow_umask

_FORMAT = "dl2pa-prototypes-1"
_TENSOR = "points"
_AUTHORS_TENSOR = "w"
_SUFFIXES = ".safetensors, .npy, or the authors' .pth"
_NORM_TOLERANCE = 1e-3
_REBUILD = "Make the file again with `dl2pa prototypes`, or copy it again"

_log = logging.getLogger(__name__)


def save_prototypes(prototypes: Prototypes, path: str | Path) -> Path:
    """Write prototypes with their certificate and a sha256 of the points.

    ``.safetensors`` holds all three; ``.npy`` holds the points and a sibling ``.json`` the rest. A file is
    complete before it takes its name, so an interrupted save leaves the earlier one.

    Args:
        prototypes: what to write.
        path: ends in ``.safetensors`` or ``.npy``; missing folders are made.

    Returns:
        The path written.

    Raises:
        UserError: another suffix, or a place that cannot be written.
    """
    path = Path(path)
    from safetensors.torch import save_file

    check_form(path)
    points = prototypes.points.detach().to("cpu", torch.float32).contiguous()
    record = {
        "format": _FORMAT,
        "sha256": _checksum(points),
        "certificate": json.dumps(prototypes.certificate.as_dict()),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            _replace(path, lambda aside: save_file({_TENSOR: points}, aside, metadata=record))
        else:
            # The record goes first: points with an older record would look damaged, never silently wrong.
            text = json.dumps(record, indent=2) + "\n"
            _replace(path.with_suffix(".json"), lambda aside: aside.write_text(text, encoding="utf-8"))
            _replace(path, lambda aside: _write_npy(aside, points))
    except OSError as error:
        message = f"cannot be written ({error.strerror or error})"
        raise UserError(str(path), path.name, message, "Choose a folder you can write to") from error
    return path


def check_form(path: Path) -> None:
    """Raise a UserError unless prototypes can be written under such a name."""
    if path.suffix not in (".safetensors", ".npy"):
        raise UserError(
            str(path), path.suffix, "prototypes are not written in this form", "Use .safetensors or .npy"
        )


def load_prototypes(path: str | Path, num_classes: int, dim: int) -> Prototypes:
    """Read prototypes, checking that they are whole and fit.

    Files of ours are verified against their checksum and keep their certificate. A plain ``.npy`` array [C,
    d] and the DL2PA authors' ``.pth``, a state dict whose ``w`` is [d, C], are measured anew. Rows whose
    length is off by more than 1e-3 are scaled to 1 with a logged warning.

    Args:
        path: the file.
        num_classes: C expected.
        dim: d expected.

    Raises:
        UserError: the file is missing, damaged, of an unknown form or of another shape; or it holds NaN,
            infinity or a zero row. Also C or d out of range.
    """
    check_shape(num_classes, dim)
    path = Path(path)
    readers = {
        ".safetensors": _read_safetensors,
        ".npy": _read_npy,
        ".pth": _read_authors,
        ".pt": _read_authors,
    }
    if path.suffix not in readers:
        raise UserError(str(path), path.suffix, "prototypes are not read from this form", f"Use {_SUFFIXES}")
    if not path.is_file():
        raise UserError(str(path), path.name, "there is no such file", "Check the path")
    try:
        points, record = readers[path.suffix](path)
    except OSError as error:
        message = f"cannot be read ({error.strerror or error})"
        raise UserError(str(path), path.name, message, "Check its permissions") from error
    _check_shape_of(points, path, num_classes, dim)
    _check_rows(points, path)
    if record is not None:
        return Prototypes(points, _verified(points, record, path))
    points = _unit_rows(points, path)
    return Prototypes(points, certify(points, "file", 0.0))


def _read_safetensors(path: Path) -> tuple[Tensor, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            record = file.metadata()
            names = list(file.keys())
            points = file.get_tensor(_TENSOR) if _TENSOR in names else None
    except SafetensorError as error:
        raise _damaged(path, f"not a whole safetensors file ({error})") from error
    if points is None or not record or record.get("format") != _FORMAT:
        message = "not a prototype file of ours: no tensor `points` with our checksum"
        raise UserError(str(path), names, message, _REBUILD + "; a plain array loads as .npy")
    return points, record


def _read_npy(path: Path) -> tuple[Tensor, dict[str, Any] | None]:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # it maps no more than the file holds
    except Exception as error:  # a damaged header can raise almost anything
        raise _damaged(path, f"not a whole .npy array of numbers ({error})") from error
    if array.dtype.kind not in "fiu":
        seen = str(array.dtype)
        raise UserError(str(path), seen, "not an array of real numbers", "Store a float32 array [C, d]")
    # Native byte order and a copy: torch takes neither foreign order nor read-only memory.
    points = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    sibling = path.with_suffix(".json")
    if not sibling.is_file():
        return points, None
    try:
        record = json.loads(sibling.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(sibling, "the record beside the .npy is not JSON") from error
    ours = isinstance(record, dict) and cast(dict[str, Any], record).get("format") == _FORMAT
    return points, cast(dict[str, Any], record) if ours else None


def _read_authors(path: Path) -> tuple[Tensor, None]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        message = "not a plain state dict of tensors, or damaged"
        raise UserError(
            str(path), path.name, message, "Only weights are loaded, never code; save it as .npy"
        ) from error
    except Exception as error:  # torch names no set of exceptions for a damaged file
        raise _damaged(path, "not a whole PyTorch file") from error
    state = cast(dict[Any, Any], state) if isinstance(state, dict) else {}
    weight = state.get(_AUTHORS_TENSOR)
    if (
        not isinstance(weight, Tensor)
        or weight.ndim != 2
        or weight.is_complex()
        or weight.layout != torch.strided
    ):
        message = "the authors' form is a state dict whose `w` is a [d, C] tensor"
        raise UserError(
            str(path), sorted(map(str, state))[:16], message, "Save the array [C, d] as .npy instead"
        )
    if weight.untyped_storage().nbytes() < weight.numel() * weight.element_size():
        raise _damaged(path, "its `w` repeats fewer numbers than it has")
    return weight.detach().T.float().contiguous(), None


def _check_shape_of(points: Tensor, path: Path, num_classes: int, dim: int) -> None:
    shape = tuple(points.shape)
    if shape == (num_classes, dim):
        return
    message = f"expected {num_classes} prototypes of {dim} dimensions, shape ({num_classes}, {dim})"
    remedy = "Use a file made for these num_classes and dim, or change them"
    if shape == (dim, num_classes):
        remedy = "It looks transposed: store the prototypes as rows"
    raise UserError(str(path), str(shape), message, remedy)


def _check_rows(points: Tensor, path: Path) -> None:
    finite = torch.isfinite(points).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise UserError(str(path), f"row {row}", "holds NaN or infinity", _REBUILD)
    zero = torch.linalg.vector_norm(points.double(), dim=1) == 0
    if bool(zero.any()):
        row = int(zero.nonzero()[0])
        raise UserError(str(path), f"row {row}", "is all zeros: it has no direction", _REBUILD)


def _unit_rows(points: Tensor, path: Path) -> Tensor:
    """Rows of length 1; those off by more than rounding are scaled, with a warning."""
    norms = torch.linalg.vector_norm(points.double(), dim=1, keepdim=True)
    worst = float((norms - 1).abs().max())
    if worst <= _NORM_TOLERANCE:
        return points
    _log.warning("%s: prototype lengths are off by up to %.3g; scaled to 1", path, worst)
    return (points.double() / norms).float()


def _verified(points: Tensor, record: dict[str, Any], path: Path) -> Certificate:
    """The certificate of a file of ours, once its points match their checksum."""
    if record.get("sha256") != _checksum(points):
        raise _damaged(path, "the points do not match their checksum")
    try:
        values = json.loads(record["certificate"])
        values.setdefault("mean_norm", mean_norm(points))  # files from before it was recorded
        values.setdefault("checked", len(points))
        certificate = Certificate(**{field.name: values[field.name] for field in fields(Certificate)})
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, "its certificate cannot be read") from error
    if (certificate.num_classes, certificate.dim) != tuple(points.shape):
        raise _damaged(path, "its certificate is for another shape")
    return certificate


def _damaged(path: Path, message: str) -> UserError:
    return UserError(str(path), path.name, f"the file is damaged: {message}", _REBUILD)


def _checksum(points: Tensor) -> str:
    """sha256 of the float32 values, little-endian, row by row."""
    array = np.ascontiguousarray(points.numpy(), dtype="<f4")
    return hashlib.sha256(array.tobytes()).hexdigest()


def _write_npy(path: Path, points: Tensor) -> None:
    with path.open("wb") as file:
        np.save(file, points.numpy())


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write aside, flush to disk, then take the name."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(aside)
        follow_umask(aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
