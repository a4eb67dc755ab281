"""Device, numerics and caches of a training process."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dl2pa import gpus
from dl2pa.config.schema import TrainConfig
from dl2pa.errors import UserError
from dl2pa.osutil import private_temporary_folder
from dl2pa.training.distributed import choose_device, set_numerics, warn_of_few_cores
from dl2pa.training.run import _cache_compiled_code  # pyright: ignore[reportPrivateUsage]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def numerics() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.mark.usefixtures("numerics")
@pytest.mark.parametrize(
    ("device", "setting", "deterministic", "benchmark"),
    [
        (CPU, None, True, None),
        (CPU, False, False, None),
        (CUDA, None, False, True),
        (CUDA, True, True, False),
    ],
)
def test_numerics_follow_the_setting_and_the_device(
    device: torch.device,
    setting: bool | None,
    deterministic: bool,
    benchmark: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.backends.cudnn.benchmark = benchmark is False
    set_numerics(TrainConfig(deterministic=setting), device, 1)
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    if benchmark is not None:
        assert torch.backends.cudnn.benchmark is benchmark
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is deterministic
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


@pytest.fixture
def gpu_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with the device file of a GPU that CUDA cannot use."""
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    monkeypatch.setattr(gpus, "DEVICE_FILES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidiactl").touch()
    (tmp_path / "nvidia0").touch()
    return tmp_path / "nvidia0"


@pytest.mark.usefixtures("gpu_file")
@pytest.mark.parametrize("visible", [None, "0", "GPU-1a2b"])
def test_auto_refuses_a_gpu_that_cuda_cannot_use(
    visible: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match="CUDA does not start") as refused:
        choose_device("auto", 0)
    assert (refused.value.field, "launch.device=cpu" in refused.value.remedy) == ("launch.device", True)
    assert choose_device("cpu", 0) == CPU


@pytest.mark.usefixtures("gpu_file")
@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_auto_trains_on_the_cpu_if_the_gpu_is_hidden(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert choose_device("auto", 0) == CPU


def test_auto_trains_on_the_cpu_without_a_gpu(gpu_file: Path) -> None:
    gpu_file.unlink()
    assert choose_device("auto", 0) == CPU


@pytest.mark.parametrize(
    ("device", "cores", "processes", "warned"),
    [(CUDA, 31, 8, True), (CUDA, 32, 8, False), (CUDA, 3, 1, True), (CPU, 1, 8, False)],
)
def test_few_cores_per_gpu_are_warned_of(
    device: torch.device, cores: int, processes: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_few_cores(device, cores, processes)
    assert [f"share {cores} usable CPU core(s)" in r.getMessage() for r in caplog.records] == [True] * warned


def test_cache_folder_is_private_and_shared_by_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = private_temporary_folder("compiled")
    assert folder == private_temporary_folder("compiled")
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["open folder", "link", "file"])
def test_cache_folder_made_by_another_user_is_not_used(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place = tmp_path / f"dl2pa-{os.getuid()}"
    if kind == "open folder":
        place.mkdir()
        place.chmod(0o777)
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.touch()
    folder = private_temporary_folder("compiled")
    assert place not in folder.parents and place.resolve() not in folder.resolve().parents
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert private_temporary_folder("compiled") == folder, "the same in every process"
    place.rename(tmp_path / "removed")
    assert private_temporary_folder("compiled") == folder, "also after the other user has removed it"


def test_cache_folder_is_in_the_home_if_another_user_takes_all_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for end in ("", *(f"-{k}" for k in range(1, 16))):
        (tmp_path / f"dl2pa-{os.getuid()}{end}").touch()
    folder = private_temporary_folder("s3")
    assert folder.parents[1] == tmp_path / "cache/dl2pa" and private_temporary_folder("s3") == folder
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


def test_compiled_code_is_cached_on_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/chosen/by/the/user")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    _cache_compiled_code()
    assert tmp_path in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parents
    assert os.environ["TRITON_CACHE_DIR"] == "/chosen/by/the/user"
