"""Prototype files: written by dl2pa (with checksum and certificate), plain arrays, the DL2PA authors' state dicts."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dl2pa.constructions import check_points_shape, check_prototype_file, check_written_file
from dl2pa.errors import UserError
from dl2pa.geometry.certificate import Certificate, certify, mean_norm
from dl2pa.geometry.prototypes import Prototypes
from dl2pa.osutil import replacing, write_atomically

_FORMAT = "dl2pa-prototypes-1"
_TENSOR = "points"
_AUTHORS_TENSOR = "w"
_NORM_TOLERANCE = 1e-3
_SAVE_AS_NPY = "Save the array [C, d] as .npy instead."
_REBUILD = "Create the file again with `dl2pa prototypes`, or copy it again."

_log = logging.getLogger(__name__)


def save_prototypes(prototypes: Prototypes, path: str | Path) -> Path:
    """Write prototypes with their certificate and a sha256 checksum of the points.

    A `.safetensors` file contains all three. With `.npy`, certificate and checksum are in a `.json` file of the same
    name. Each file is replaced atomically.

    Args:
        path: ends in `.safetensors` or `.npy`; missing folders are created.

    Returns:
        The path of the file.

    Raises:
        UserError: another suffix, or the file cannot be written.
    """
    from safetensors.torch import save_file

    path = Path(path)
    check_written_file(path)
    points = prototypes.points.detach().to("cpu", torch.float32).contiguous()
    record = {
        "format": _FORMAT,
        "sha256": _checksum(points),
        "certificate": json.dumps(prototypes.certificate.as_dict()),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            # The record is written first: after an interruption the checksum fails instead of passing by mistake.
            write_atomically(path.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
        with replacing(path, points.nbytes) as temporary:
            if path.suffix == ".npy":
                np.save(temporary, points.numpy())
            else:
                save_file({_TENSOR: points}, temporary, metadata=record)
    except OSError as error:
        message = f"cannot be written ({error.strerror or error})"
        raise UserError(str(path), path.name, message, "Choose a folder that you can write to.") from error
    return path


def load_prototypes(path: str | Path, num_classes: int, dim: int) -> Prototypes:
    """Load prototypes and check them.

    Files written by dl2pa are verified against their checksum and keep their certificate. A plain `.npy` array [C, d]
    or the DL2PA authors' `.pth`, a state dict whose `w` is [d, C], gets a new certificate; if norms differ from 1 by
    more than 1e-3, the rows are normalized and a warning is logged.

    Args:
        num_classes: expected C.
        dim: expected d.

    Raises:
        UserError: the file is missing, damaged or of an unknown format, has another shape, or contains NaN, infinity or
            a zero row; or C or d is out of range.
    """
    path = Path(path)
    check_prototype_file(path, num_classes, dim)
    readers = {
        ".safetensors": _read_safetensors,
        ".npy": _read_npy,
        ".pth": _read_authors,
        ".pt": _read_authors,
    }
    try:
        points, record = readers[path.suffix](path)
    except OSError as error:
        message = f"cannot be read ({error.strerror or error})"
        raise UserError(str(path), path.name, message, "Check its permissions.") from error
    check_points_shape(tuple(points.shape), path, num_classes, dim)
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
        raise _damaged(path, f"not a complete safetensors file ({error})") from error
    if points is None or not record or record.get("format") != _FORMAT:
        message = "not a prototype file written by dl2pa: it has no tensor `points` with a checksum"
        raise UserError(str(path), names, message, _REBUILD + " Save a plain array as .npy.")
    return points, record


def _read_npy(path: Path) -> tuple[Tensor, dict[str, Any] | None]:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # maps no more than the file contains
    except Exception as error:  # a damaged header can raise any exception
        raise _damaged(path, f"not a complete .npy array of numbers ({error})") from error
    if array.dtype.kind not in "fiu":
        message = "is not an array of real numbers"
        raise UserError(str(path), str(array.dtype), message, "Save a float32 array [C, d].")
    # torch accepts neither foreign byte order nor read-only memory.
    points = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    sibling = path.with_suffix(".json")
    if not sibling.is_file():
        return points, None
    try:
        record = json.loads(sibling.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(sibling, "the certificate file of the .npy is not JSON") from error
    written_by_dl2pa = isinstance(record, dict) and cast(dict[str, Any], record).get("format") == _FORMAT
    return points, cast(dict[str, Any], record) if written_by_dl2pa else None


def _read_authors(path: Path) -> tuple[Tensor, None]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        message = "is damaged or not a state dict of tensors only"
        raise UserError(str(path), path.name, message, _SAVE_AS_NPY) from error
    except Exception as error:  # torch does not document the exceptions for a damaged file
        raise _damaged(path, "not a complete PyTorch file") from error
    state = cast(dict[Any, Any], state) if isinstance(state, dict) else {}
    weight = state.get(_AUTHORS_TENSOR)
    if (
        not isinstance(weight, Tensor)
        or weight.ndim != 2
        or weight.is_complex()
        or weight.layout != torch.strided
    ):
        message = "is not a state dict whose `w` is a [d, C] tensor, the authors' format"
        raise UserError(str(path), sorted(map(str, state))[:16], message, _SAVE_AS_NPY)
    if weight.untyped_storage().nbytes() < weight.numel() * weight.element_size():
        raise _damaged(path, "the storage of `w` is smaller than its shape")
    return weight.detach().T.float().contiguous(), None


def _check_rows(points: Tensor, path: Path) -> None:
    finite = torch.isfinite(points).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise UserError(str(path), f"row {row}", "contains NaN or infinity", _REBUILD)
    zero = torch.linalg.vector_norm(points.double(), dim=1) == 0
    if bool(zero.any()):
        row = int(zero.nonzero()[0])
        raise UserError(str(path), f"row {row}", "is all zeros and has no direction", _REBUILD)


def _unit_rows(points: Tensor, path: Path) -> Tensor:
    """Normalize the rows, with a warning, unless all norms are 1 up to rounding."""
    norms = torch.linalg.vector_norm(points.double(), dim=1, keepdim=True)
    worst = float((norms - 1).abs().max())
    if worst <= _NORM_TOLERANCE:
        return points
    _log.warning("%s: prototype norms differ from 1 by up to %.3g; rows were normalized", path, worst)
    return (points.double() / norms).float()


def _verified(points: Tensor, record: dict[str, Any], path: Path) -> Certificate:
    """Verify the checksum of a file written by dl2pa and parse its certificate."""
    if record.get("sha256") != _checksum(points):
        raise _damaged(path, "the points do not match their checksum")
    try:
        values = json.loads(record["certificate"])
        values.setdefault("mean_norm", mean_norm(points))  # older files do not have these two
        values.setdefault("checked", len(points))
        certificate = Certificate(**{field.name: values[field.name] for field in fields(Certificate)})
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, "its certificate cannot be read") from error
    if (certificate.num_classes, certificate.dim) != tuple(points.shape):
        raise _damaged(path, "its certificate has another shape")
    return certificate


def _damaged(path: Path, message: str) -> UserError:
    return UserError(str(path), path.name, f"the file is damaged: {message}", _REBUILD)


def _checksum(points: Tensor) -> str:
    """sha256 of the float32 values, little-endian, in row order."""
    array = np.ascontiguousarray(points.numpy(), dtype="<f4")
    return hashlib.sha256(array.tobytes()).hexdigest()
