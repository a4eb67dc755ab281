"""Prototype files: what is written comes back; what is damaged or does not fit is refused by name."""

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


def refusal(path: Path, num_classes: int = 11, dim: int = 7) -> UserError:
    """The error loading ``path`` ends in; it must name the file."""
    with pytest.raises(UserError) as caught:
        load_prototypes(path, num_classes, dim)
    assert path.stem in caught.value.field
    return caught.value


@pytest.mark.parametrize("name", ["p.safetensors", "p.npy", 'deep/er/it\'s a; "p".npy'])
def test_a_round_trip_keeps_points_and_certificate(tmp_path: Path, name: str) -> None:
    built = build_prototypes(11, 7)
    path = save_prototypes(built, tmp_path / name)
    loaded = load_prototypes(path, 11, 7)
    assert torch.equal(loaded.points, built.points)
    assert loaded.points.dtype == torch.float32
    assert loaded.certificate == built.certificate
    assert not list(path.parent.glob("*.tmp"))


def test_saving_again_replaces(tmp_path: Path) -> None:
    for name in ("p.npy", "p.safetensors"):
        save_prototypes(build_prototypes(5, 4), tmp_path / name)
        save_prototypes(build_prototypes(11, 7), tmp_path / name)
        assert load_prototypes(tmp_path / name, 11, 7).certificate.max_cosine == 0.0


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.safetensors or \.npy"):
        save_prototypes(build_prototypes(5, 4), tmp_path / "p.txt")
    (tmp_path / "p.txt").write_text("1 2 3")
    assert ".npy" in refusal(tmp_path / "p.txt").remedy


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_prototypes(build_prototypes(5, 4), tmp_path / "file" / "p.npy")


@pytest.mark.parametrize("name", ["p.safetensors", "p.npy"])
def test_a_changed_value_fails_the_checksum(tmp_path: Path, name: str) -> None:
    path = save_prototypes(build_prototypes(11, 7), tmp_path / name)
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x01
    path.write_bytes(content)
    assert "checksum" in refusal(path).message


@pytest.mark.parametrize("name", ["p.safetensors", "p.npy"])
@pytest.mark.parametrize("left", [0, 5, 60, -8])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, left: int) -> None:
    path = save_prototypes(build_prototypes(11, 7), tmp_path / name)
    path.write_bytes(path.read_bytes()[:left])
    assert "damaged" in refusal(path).message


@pytest.mark.parametrize("text", ["", "{", '{"format": "dl2pa-prototypes-1"}'])
def test_a_damaged_record_beside_an_npy_is_refused(tmp_path: Path, text: str) -> None:
    path = save_prototypes(build_prototypes(11, 7), tmp_path / "p.npy")
    path.with_suffix(".json").write_text(text)
    assert "damaged" in refusal(path).message


@pytest.mark.parametrize("certificate", ["{", "[]", "{}", '{"num_classes": 3}'])
def test_a_damaged_certificate_is_refused(tmp_path: Path, certificate: str) -> None:
    path = save_prototypes(build_prototypes(11, 7), tmp_path / "p.npy")
    record = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(record | {"certificate": certificate}))
    assert "certificate" in refusal(path).message


def test_a_foreign_safetensors_is_refused(tmp_path: Path) -> None:
    save_file({"points": torch.eye(4)}, tmp_path / "p.safetensors")
    assert "not a prototype file of ours" in refusal(tmp_path / "p.safetensors", 4, 4).message


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_a_plain_npy_is_measured(tmp_path: Path, dtype: str) -> None:
    points = build_prototypes(10, 9).points
    np.save(tmp_path / "p.npy", points.numpy().astype(dtype))
    loaded = load_prototypes(tmp_path / "p.npy", 10, 9)
    assert loaded.certificate.construction == "file"
    assert loaded.certificate.max_cosine == pytest.approx(-1 / 9, abs=1e-3)


def test_an_unrelated_json_beside_a_plain_npy_is_ignored(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.eye(4, dtype=np.float32))
    (tmp_path / "p.json").write_text('{"notes": "mine"}')
    assert load_prototypes(tmp_path / "p.npy", 4, 4).certificate.max_cosine == 0.0


@pytest.mark.parametrize("num_classes", [10, 9])
def test_the_authors_state_dict_is_transposed(tmp_path: Path, num_classes: int) -> None:
    """9×9 too: the shape alone cannot tell which way round it is."""
    points = build_prototypes(num_classes, 9).points
    torch.save({"w": points.T.contiguous()}, tmp_path / "p.pth")
    assert torch.equal(load_prototypes(tmp_path / "p.pth", num_classes, 9).points, points)


class Payload:
    """Stands for anything that would need code to load."""


@pytest.mark.parametrize(
    "content", [{"v": torch.eye(3)}, {"w": torch.ones(3)}, torch.eye(3), {"w": Payload()}]
)
def test_other_pth_contents_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "p.pth")
    assert ".npy" in refusal(tmp_path / "p.pth", 3, 3).remedy


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut"])
def test_a_damaged_pth_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.pth").write_bytes(content)
    assert "damaged" in refusal(tmp_path / "p.pth").message


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.npy").message
    (tmp_path / "folder.npy").mkdir()
    assert "no such file" in refusal(tmp_path / "folder.npy").message


@pytest.mark.parametrize("name", ["p.safetensors", "p.npy"])
def test_another_shape_is_refused(tmp_path: Path, name: str) -> None:
    path = save_prototypes(build_prototypes(11, 7), tmp_path / name)
    error = refusal(path, 12, 7)
    assert error.value == "(11, 7)"
    assert "12" in error.message
    assert "transposed" in refusal(path, 7, 11).remedy


@pytest.mark.parametrize(("value", "says"), [(np.nan, "NaN"), (np.inf, "infinity"), (0.0, "zeros")])
def test_rows_without_a_direction_are_refused(tmp_path: Path, value: float, says: str) -> None:
    points = np.eye(4, dtype=np.float32)
    points[2] = value
    np.save(tmp_path / "p.npy", points)
    error = refusal(tmp_path / "p.npy", 4, 4)
    assert error.value == "row 2"
    assert says in error.message


def test_arrays_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.eye(4, dtype=np.complex64))
    assert refusal(tmp_path / "p.npy", 4, 4).value == "complex64"
    np.save(tmp_path / "q.npy", np.array([{}], dtype=object), allow_pickle=True)
    refusal(tmp_path / "q.npy", 4, 4)


def test_rows_of_another_length_are_scaled_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    points = np.eye(4, dtype=np.float32)
    points[1] *= 3
    np.save(tmp_path / "p.npy", points)
    with caplog.at_level(logging.WARNING, logger="dl2pa.geometry.files"):
        loaded = load_prototypes(tmp_path / "p.npy", 4, 4)
    assert torch.equal(loaded.points, torch.eye(4))
    assert "scaled to 1" in caplog.text


def test_rounding_of_lengths_is_not_worth_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    points = build_prototypes(10, 9).points
    np.save(tmp_path / "p.npy", points.numpy() * np.float32(1.0005))
    load_prototypes(tmp_path / "p.npy", 10, 9)
    assert not caplog.text
