"""`dl2pa doctor`: the compiler for torch.compile and the hardware JPEG decoder."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import Any

import pytest

from dl2pa.commands import gpu_health


def test_without_a_gpu_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_health, "_load_stub", None)
    monkeypatch.setattr(gpu_health, "_find_nvjpeg", None)
    for finding in (gpu_health.compiler(gpu=False), gpu_health.jpeg_decoder(gpu=False)):
        assert (finding.ok, finding.seen, finding.needed) == (False, "no GPU", False)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_the_compiler_is_run_and_its_result_loaded() -> None:
    finding = gpu_health.compiler(gpu=True)
    assert finding.ok, finding.seen
    assert "gcc" in finding.seen


def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    finding = gpu_health.compiler(gpu=True)
    assert not finding.ok and "no C compiler" in finding.seen and "Install gcc" in finding.remedy
    monkeypatch.setenv("CC", "/absent/cc")
    finding = gpu_health.compiler(gpu=True)
    assert not finding.ok and "/absent/cc" in finding.seen and "CC" in finding.remedy


def test_missing_python_headers_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    monkeypatch.setattr(gpu_health.sysconfig, "get_path", lambda *_: str(tmp_path))
    finding = gpu_health.compiler(gpu=True)
    assert not finding.ok and "Python.h" in finding.seen and "headers" in finding.remedy


class Nvjpeg:
    """The three functions of nvJPEG that are called."""

    def __init__(self, status: int, engines: int) -> None:
        self._status = status
        self._engines = engines

    def nvjpegCreateEx(self, backend: int, *_: Any) -> int:
        assert backend == 3
        return self._status

    def nvjpegGetHardwareDecoderInfo(self, _: Any, engines: Any, cores: Any) -> int:
        ctypes.cast(engines, ctypes.POINTER(ctypes.c_uint))[0] = self._engines
        ctypes.cast(cores, ctypes.POINTER(ctypes.c_uint))[0] = 8
        return 0

    def nvjpegDestroy(self, _: Any) -> int:
        return 0


@pytest.mark.parametrize(
    ("status", "engines", "video", "seen"),
    [
        (0, 2, True, "2 engine(s) of 8 core(s)"),
        (0, 0, True, "this GPU has none"),
        (7, 0, True, "this GPU has none"),
        (7, 0, False, "libnvcuvid.so.1 of the driver is not visible"),
        (1, 0, True, "does not start (nvJPEG status 1)"),
    ],
)
def test_the_hardware_decoder_is_queried(
    status: int, engines: int, video: bool, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> Nvjpeg:
        if "nvcuvid" in name and not video:
            raise OSError(name)
        return Nvjpeg(status, engines)

    monkeypatch.setattr(gpu_health, "_find_nvjpeg", lambda: Path("libnvjpeg.so.13"))
    monkeypatch.setattr(gpu_health.ctypes, "CDLL", load)
    finding = gpu_health.jpeg_decoder(gpu=True)
    assert (finding.seen, finding.ok) == (seen, engines > 0)
    assert ("NVIDIA_DRIVER_CAPABILITIES" in finding.remedy) == (not video)


def test_dali_s_decoder_library_is_installed_and_has_the_functions() -> None:
    pytest.importorskip("nvidia.dali")
    path = gpu_health._find_nvjpeg()
    assert path is not None
    symbols = path.read_bytes()
    assert b"nvjpegGetHardwareDecoderInfo" in symbols and b"libnvcuvid.so.1" in symbols
