"""`dl2pa doctor`: findings about mounts, folders and devices."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dl2pa.commands import doctor
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE

Checks = dict[str, dict[str, Any]]


@pytest.fixture
def doctor_in_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[], tuple[int, Checks]]:
    """Run doctor as in the container image, in a folder that contains runs/; return exit code and checks."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DL2PA_IMAGE", "unknown")
    monkeypatch.delenv("DL2PA_DATA", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(doctor.cluster_health, "findings", lambda **_: [])

    def run() -> tuple[int, Checks]:
        code = doctor.run(SimpleNamespace(json=True, cluster=False, partition=None, write_profile=None))
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])["checks"]

    return run


def test_a_run_folder_inside_the_container_is_reported(
    doctor_in_image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Path("runs").stat().st_dev != Path("/").stat().st_dev:
        pytest.skip("the temporary folder is a separate file system")
    code, checks = doctor_in_image()
    assert code == EXIT_DONE
    assert not checks["run volume"]["ok"] and "-v DIR:/runs" in checks["run volume"]["remedy"]
    monkeypatch.delenv("DL2PA_IMAGE")
    assert "run volume" not in doctor_in_image()[1]


def test_a_mounted_run_folder_is_recognized(doctor_in_image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == Path("/").stat().st_dev:
        pytest.skip("/dev/shm is not a separate file system")
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        (Path(folder) / "runs").mkdir()
        with monkeypatch.context() as inside:
            inside.chdir(folder)
            assert doctor_in_image()[1]["run volume"]["ok"]


@pytest.mark.parametrize(
    ("files", "message"), [(None, "No such file"), ([], "is empty"), (["photo.jpeg"], "")]
)
def test_the_data_folder_must_be_readable_and_not_empty(
    doctor_in_image: Any,
    files: list[str] | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tmp_path / "data"
    if files is not None:
        data.mkdir()
        for name in files:
            (data / name).touch()
    monkeypatch.setenv("DL2PA_DATA", str(data))
    code, checks = doctor_in_image()
    assert code == EXIT_DONE, "the configuration can name the data too"
    assert checks["DL2PA_DATA"]["ok"] == bool(files)
    assert message in checks["DL2PA_DATA"]["seen"]


def test_a_missing_temporary_folder_fails(doctor_in_image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(doctor.tempfile, "gettempdir", nowhere)
    code, checks = doctor_in_image()
    assert code == EXIT_FAILURE
    assert not checks["scratch"]["ok"] and "--tmpfs /tmp" in checks["scratch"]["remedy"]


def test_a_driver_without_visible_gpus_is_reported(
    doctor_in_image: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path / "absent")
    assert "--gpus" not in doctor_in_image()[1]["gpu"]["remedy"]
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path)
    assert "--gpus all" in doctor_in_image()[1]["gpu"]["remedy"]
