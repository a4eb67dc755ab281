"""What doctor says of a container's mounts."""

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

Seen = dict[str, dict[str, Any]]


@pytest.fixture
def look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[], tuple[int, Seen]]:
    """Run doctor as in the image, from a folder that holds runs/; returns its exit code and findings."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DL2PA_IMAGE", "unknown")
    monkeypatch.delenv("DL2PA_DATA", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(doctor.cluster_health, "findings", lambda **_: [])

    def run() -> tuple[int, Seen]:
        code = doctor.run(SimpleNamespace(json=True, cluster=False, partition=None))
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])["checks"]

    return run


def test_runs_that_end_with_the_container_are_told_of(look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("runs").stat().st_dev != Path("/").stat().st_dev:
        pytest.skip("the temporary folder is a file system of its own")
    code, seen = look()
    assert code == EXIT_DONE
    assert not seen["run volume"]["ok"] and "-v DIR:/runs" in seen["run volume"]["remedy"]
    monkeypatch.delenv("DL2PA_IMAGE")
    assert "run volume" not in look()[1]


def test_mounted_runs_are_recognized(look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == Path("/").stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own")
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        (Path(folder) / "runs").mkdir()
        with monkeypatch.context() as inside:
            inside.chdir(folder)
            assert look()[1]["run volume"]["ok"]


@pytest.mark.parametrize(("made", "said"), [(None, "No such file"), ([], "is empty"), (["photo.jpeg"], "")])
def test_data_has_to_be_there_and_readable(
    look: Any, made: list[str] | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    if made is not None:
        data.mkdir()
        for name in made:
            (data / name).touch()
    monkeypatch.setenv("DL2PA_DATA", str(data))
    code, seen = look()
    assert code == EXIT_DONE, "data can be named in the configuration as well"
    assert seen["DL2PA_DATA"]["ok"] == bool(made)
    assert said in seen["DL2PA_DATA"]["seen"]


def test_without_a_place_for_temporary_files_nothing_can_train(
    look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(doctor.tempfile, "gettempdir", nowhere)
    code, seen = look()
    assert code == EXIT_FAILURE
    assert not seen["scratch"]["ok"] and "--tmpfs /tmp" in seen["scratch"]["remedy"]


def test_a_driver_without_visible_devices_is_not_taken_for_a_machine_without_gpus(
    look: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path / "absent")
    assert "--gpus" not in look()[1]["gpu"]["remedy"]
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path)
    assert "--gpus all" in look()[1]["gpu"]["remedy"]
