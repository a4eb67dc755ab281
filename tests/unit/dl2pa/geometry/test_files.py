"""Prototype files: round trips, and rejection of damaged files and other shapes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dl2pa.errors import UserError
from dl2pa.geometry import build_prototypes, load_prototypes, save_prototypes


def load_error(path: Path, num_classes: int = 11, dim: int = 7) -> UserError:
    """Load `path` and return the error, which must name the file."""
    with pytest.raises(UserError) as caught:
        load_prototypes(path, num_classes, dim)
    assert path.stem in caught.value.field
    return caught.value


@pytest.mark.parametrize("name", ["p.safetensors", "p.npy", 'deep/er/it\'s a; "p".npy'])
def test_round_trip_keeps_points_and_certificate(tmp_path: Path, name: str) -> None:
    built = build_prototypes(11, 7)
    path = save_prototypes(built, tmp_path / name)
    loaded = load_prototypes(path, 11, 7)
    assert torch.equal(loaded.points, built.points)
    assert loaded.points.dtype == torch.float32
    assert loaded.certificate == built.certificate
    assert not list(path.parent.glob(".*"))


def test_saving_again_replaces_the_file(tmp_path: Path) -> None:
    for name in ("p.npy", "p.safetensors"):
        save_prototypes(build_prototypes(5, 4), tmp_path / name)
        save_prototypes(build_prototypes(11, 7), tmp_path / name)
        assert load_prototypes(tmp_path / name, 11, 7).certificate.max_cosine == 0.0


def test_other_suffixes_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.safetensors or \.npy"):
        save_prototypes(build_prototypes(5, 4), tmp_path / "p.txt")
    (tmp_path / "p.txt").write_text("1 2 3")
    assert ".npy" in load_error(tmp_path / "p.txt").remedy


def test_unwritable_path_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_prototypes(build_prototypes(5, 4), tmp_path / "file" / "p.npy")


@pytest.mark.parametrize("name", ["p.safetensors", "p.npy"])
def test_changed_value_fails_the_checksum(tmp_path: Path, name: str) -> None:
    path = save_prototypes(build_prototypes(11, 7), tmp_path / name)
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x01
    path.write_bytes(content)
    assert "checksum" in load_error(path).message


@pytest.mark.parametrize("name", ["p.safetensors", "p.npy"])
@pytest.mark.parametrize("size", [0, 5, 60, -8])
def test_truncated_file_is_rejected(tmp_path: Path, name: str, size: int) -> None:
    path = save_prototypes(build_prototypes(11, 7), tmp_path / name)
    path.write_bytes(path.read_bytes()[:size])
    assert "damaged" in load_error(path).message


@pytest.mark.parametrize("text", ["", "{", '{"format": "dl2pa-prototypes-1"}'])
def test_damaged_certificate_file_of_an_npy_is_rejected(tmp_path: Path, text: str) -> None:
    path = save_prototypes(build_prototypes(11, 7), tmp_path / "p.npy")
    path.with_suffix(".json").write_text(text)
    assert "damaged" in load_error(path).message


@pytest.mark.parametrize("certificate", ["{", "[]", "{}", '{"num_classes": 3}'])
def test_damaged_certificate_is_rejected(tmp_path: Path, certificate: str) -> None:
    path = save_prototypes(build_prototypes(11, 7), tmp_path / "p.npy")
    record = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(record | {"certificate": certificate}))
    assert "certificate" in load_error(path).message


def test_safetensors_of_another_program_is_rejected(tmp_path: Path) -> None:
    save_file({"points": torch.eye(4)}, tmp_path / "p.safetensors")
    assert "not a prototype file written by dl2pa" in load_error(tmp_path / "p.safetensors", 4, 4).message


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_plain_npy_gets_a_certificate(tmp_path: Path, dtype: str) -> None:
    points = build_prototypes(10, 9).points
    np.save(tmp_path / "p.npy", points.numpy().astype(dtype))
    loaded = load_prototypes(tmp_path / "p.npy", 10, 9)
    assert loaded.certificate.construction == "file"
    assert loaded.certificate.max_cosine == pytest.approx(-1 / 9, abs=1e-3)


def test_unrelated_json_of_the_same_name_is_ignored(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.eye(4, dtype=np.float32))
    (tmp_path / "p.json").write_text('{"notes": "mine"}')
    assert load_prototypes(tmp_path / "p.npy", 4, 4).certificate.max_cosine == 0.0


@pytest.mark.parametrize("num_classes", [10, 9])
def test_state_dict_of_the_authors_is_transposed(tmp_path: Path, num_classes: int) -> None:
    """Also for 9×9, where the shape does not show the orientation."""
    points = build_prototypes(num_classes, 9).points
    torch.save({"w": points.T.contiguous()}, tmp_path / "p.pth")
    assert torch.equal(load_prototypes(tmp_path / "p.pth", num_classes, 9).points, points)


class Payload:
    """An object that would need code to load."""


@pytest.mark.parametrize(
    "content", [{"v": torch.eye(3)}, {"w": torch.ones(3)}, torch.eye(3), {"w": Payload()}]
)
def test_other_pth_contents_are_rejected(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "p.pth")
    assert ".npy" in load_error(tmp_path / "p.pth", 3, 3).remedy


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut"])
def test_damaged_pth_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.pth").write_bytes(content)
    assert "damaged" in load_error(tmp_path / "p.pth").message


def test_missing_files_and_folders_are_rejected(tmp_path: Path) -> None:
    assert "no such file" in load_error(tmp_path / "absent.npy").message
    (tmp_path / "folder.npy").mkdir()
    assert "no such file" in load_error(tmp_path / "folder.npy").message


@pytest.mark.parametrize("name", ["p.safetensors", "p.npy"])
def test_another_shape_is_rejected(tmp_path: Path, name: str) -> None:
    path = save_prototypes(build_prototypes(11, 7), tmp_path / name)
    error = load_error(path, 12, 7)
    assert error.value == "(11, 7)"
    assert "12" in error.message
    assert "transposed" in load_error(path, 7, 11).remedy


@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN"), (np.inf, "infinity"), (0.0, "zeros")])
def test_rows_without_a_direction_are_rejected(tmp_path: Path, value: float, message: str) -> None:
    points = np.eye(4, dtype=np.float32)
    points[2] = value
    np.save(tmp_path / "p.npy", points)
    error = load_error(tmp_path / "p.npy", 4, 4)
    assert error.value == "row 2"
    assert message in error.message


def test_arrays_that_are_not_real_are_rejected(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.eye(4, dtype=np.complex64))
    assert load_error(tmp_path / "p.npy", 4, 4).value == "complex64"
    np.save(tmp_path / "q.npy", np.array([{}], dtype=object), allow_pickle=True)
    load_error(tmp_path / "q.npy", 4, 4)


def test_rows_are_normalized_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    points = np.eye(4, dtype=np.float32)
    points[1] *= 3
    np.save(tmp_path / "p.npy", points)
    with caplog.at_level(logging.WARNING, logger="dl2pa.geometry.files"):
        loaded = load_prototypes(tmp_path / "p.npy", 4, 4)
    assert torch.equal(loaded.points, torch.eye(4))
    assert "rows were normalized" in caplog.text


def test_rounding_of_norms_gives_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    points = build_prototypes(10, 9).points
    np.save(tmp_path / "p.npy", points.numpy() * np.float32(1.0005))
    load_prototypes(tmp_path / "p.npy", 10, 9)
    assert not caplog.text
