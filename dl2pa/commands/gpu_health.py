"""Checks of `dl2pa doctor` on a GPU: the compiler for torch.compile, and the hardware JPEG decoder."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from dl2pa.commands.finding import Finding
from dl2pa.container import in_container

NO_GPU = "no GPU"
_COMPILE, _DECODER = "torch.compile", "jpeg hardware"
_VIDEO_LIBRARY = "libnvcuvid.so.1"
_HARDWARE_BACKEND = 3  # NVJPEG_BACKEND_HARDWARE
_NO_HARDWARE = 7  # NVJPEG_STATUS_ARCH_MISMATCH


def compiler(gpu: bool) -> Finding:
    """Compile and load a stub as Triton does at run time for kernels of torch.compile.

    Args:
        gpu: CUDA works; without a GPU nothing is checked.
    """
    if not gpu:
        return Finding(_COMPILE, False, NO_GPU, needed=False)
    name = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # in Triton's order
    if name is None:
        remedy = "Install gcc and Python's headers, or set CC; without them leave train.compile=false."
        return Finding(_COMPILE, False, "no C compiler (gcc or clang)", remedy, needed=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _load_stub(name, Path(folder))
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip() or f"exit code {error.returncode}").splitlines()[0]
        remedy = "Install Python's headers (libpython3-dev or python3-devel)."
        return Finding(_COMPILE, False, f"{name}: {reason}", remedy, needed=False)
    except OSError as error:
        remedy = (
            f"Set CC to a C compiler and TMPDIR to a folder from which code can be loaded{_exec_mount()}."
        )
        return Finding(_COMPILE, False, str(error), remedy, needed=False)
    return Finding(_COMPILE, True, f"{name} compiles Triton's C code")


def _exec_mount() -> str:
    return " (--tmpfs /tmp:exec)" if in_container() else ""


def _load_stub(name: str, folder: Path) -> None:
    """Compile a shared library that includes Python.h, and load it from the temporary folder.

    Raises:
        CalledProcessError: the compiler failed.
        OSError: the compiler does not start, or the folder is mounted without permission to execute.
    """
    source, library = folder / "stub.c", folder / "stub.so"
    source.write_text("#include <Python.h>\n#include <dlfcn.h>\nint dl2pa_stub(void) { return 7; }\n")
    headers = sysconfig.get_path("include", "posix_prefix")
    command = [name, str(source), "-O3", "-shared", "-fPIC", "-o", str(library), f"-I{headers}"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    if ctypes.CDLL(str(library)).dl2pa_stub() != 7:
        raise OSError(f"{name} produces wrong code")


def jpeg_decoder(gpu: bool) -> Finding:
    """Query the hardware JPEG decoder through nvJPEG, as DALI does.

    Without it, or without the driver's video library, DALI silently decodes on the GPU's cores and on CPUs.

    Args:
        gpu: CUDA works and is initialized.
    """
    if not gpu:
        return Finding(_DECODER, False, NO_GPU, needed=False)
    path = _find_nvjpeg()
    if path is None:
        return Finding(_DECODER, False, "DALI's nvJPEG is not installed", needed=False)
    try:
        status, engines, cores = _hardware_engines(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        return Finding(_DECODER, False, f"unknown: {error}", "Reinstall DALI.", needed=False)
    if status == 0 and engines:
        return Finding(_DECODER, True, f"{engines} engine(s) of {cores} core(s)")
    if status == 0 or status == _NO_HARDWARE:
        seen, remedy = "this GPU has none", ""
    else:
        seen, remedy = f"does not start (nvJPEG status {status})", "Update the driver."
    try:
        ctypes.CDLL(_VIDEO_LIBRARY)
    except OSError:
        seen = f"{_VIDEO_LIBRARY} of the driver is not visible"
        remedy = "In a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility,video."
    return Finding(_DECODER, False, seen, remedy, needed=False)


def _find_nvjpeg() -> Path | None:
    """The nvJPEG library that DALI loads: `nvidia/cu13/lib` for CUDA 13, `nvidia/nvjpeg/lib` for CUDA 12."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*/lib/libnvjpeg.so.*")):
            return path
    return None


def _hardware_engines(library: ctypes.CDLL) -> tuple[int, int, int]:
    """Status of a decoder with the hardware backend, and its engines and cores per engine."""
    handle, engines, cores = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    status = library.nvjpegCreateEx(_HARDWARE_BACKEND, None, None, 0, ctypes.byref(handle))
    if status:
        return status, 0, 0
    status = library.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores))
    library.nvjpegDestroy(handle)
    return status, engines.value, cores.value
