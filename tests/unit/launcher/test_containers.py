"""Container engines and mounted folders."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dl2pa.errors import UserError
from launcher.containers import Container

Fake = Callable[[str, str], Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Create a command that prints a text; PATH contains no other command, and the working directory is `work`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("DL2PA_DATA", raising=False)
    monkeypatch.chdir(tmp_path / "work")

    def make(name: str, output: str = "") -> Path:
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/sh\necho '{output}'\n", encoding="utf-8")
        file.chmod(0o755)
        return file

    return make


def test_pyxis_is_used_if_srun_supports_it(fake: Fake, tmp_path: Path) -> None:
    fake("srun", "  --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH")
    fake("apptainer", "")
    container = Container.find("team/dl2pa:1", [tmp_path / "runs/a"])
    assert container.srun_options() == [
        "--container-image=team/dl2pa:1",
        f"--container-mounts={tmp_path}/runs:{tmp_path}/runs,{tmp_path}/work:{tmp_path}/work",
        f"--container-workdir={tmp_path}/work",
        "--no-container-mount-home",
    ]
    assert container.prefix() == []


@pytest.mark.parametrize("name", ["apptainer", "singularity"])
def test_apptainer_is_used_without_pyxis(fake: Fake, name: str, tmp_path: Path) -> None:
    fake("srun", "Usage: srun [OPTIONS...] executable [args...]")
    engine = fake(name, "")
    container = Container.find("dl2pa.sif", [tmp_path / "a run;/x"])
    assert container.srun_options() == []
    assert container.prefix() == [
        *(str(engine), "exec", "--nv"),
        *("--bind", f"{tmp_path}/a run;", "--bind", f"{tmp_path}/work"),
        *("--pwd", f"{tmp_path}/work", "dl2pa.sif"),
        *("env", "--unset=PYTHONPATH"),
    ]


@pytest.mark.parametrize("has_srun", [True, False])
def test_a_missing_engine_is_refused(fake: Fake, has_srun: bool, tmp_path: Path) -> None:
    if has_srun:
        fake("srun", "Usage: srun [OPTIONS...] executable [args...]")
    with pytest.raises(UserError, match=r"--container='dl2pa.sif': neither .*Pyxis.* nor apptainer"):
        Container.find("dl2pa.sif", [tmp_path / "a"])


def test_nested_folders_are_mounted_once(fake: Fake, tmp_path: Path) -> None:
    fake("apptainer", "")
    runs = [tmp_path / "work/runs/a", tmp_path / "runs/a/x", tmp_path / "runs-too/b"]
    more = [str(tmp_path / "runs"), f"{tmp_path}/work/../work/data"]
    mounts = Container.find("dl2pa.sif", runs, more).mounts
    assert mounts == (f"{tmp_path}/runs", f"{tmp_path}/runs-too", f"{tmp_path}/work")


def test_the_folder_in_DL2PA_DATA_is_mounted(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("apptainer", "")
    monkeypatch.setenv("DL2PA_DATA", "/datasets")
    mounts = Container.find("dl2pa.sif", [tmp_path / "work/runs/a"]).mounts
    assert mounts == ("/datasets", f"{tmp_path}/work")


def test_the_hosts_python_path_is_unset_in_the_image(tmp_path: Path) -> None:
    """A fake Apptainer passes the whole environment, as the real one does."""
    engine = tmp_path / "apptainer"
    engine.write_text('#!/bin/sh\nwhile [ "$1" != "the image" ]; do shift; done\nshift\nexec "$@"\n')
    engine.chmod(0o755)
    prefix = Container("the image", str(engine), (str(tmp_path),)).prefix()
    show = "import os; print(os.environ.get('PYTHONPATH'), os.environ['DL2PA_HEAD'])"
    done = subprocess.run(
        [*prefix, sys.executable, "-c", show],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "DL2PA_HEAD": "node1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "None node1\n"
