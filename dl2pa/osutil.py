"""Operating system helpers: atomic writes, file permissions, processes and cores."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dl2pa.redaction import redact_tree

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here because a forked child must not load libraries


def usable_cores() -> int:
    """CPU cores that this process may use; a container or a SLURM job may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def set_parent_death_signal(signal_number: int) -> None:
    """Ask Linux to send this process a signal when its parent ends; usable between fork and exec."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal_number)


def process_runs(pid: int) -> bool:
    """Whether a process of this machine is running; a zombie is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"


def follow_umask(path: Path) -> None:
    """Give a file the permissions of the user's umask; safetensors writes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def open_private(path: Path, mode: str) -> IO[Any]:
    """Open a file for writing (``w`` or ``a``) and make it readable by its owner only."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_APPEND if "a" in mode else os.O_TRUNC)
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, 0o600)
    return os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8")


def private_temporary_folder(name: str) -> Path:
    """Folder of this user for temporary files of this machine, the same in every process.

    Code may be loaded from it. If another user has created a folder with this name, a new one is created.
    """
    folder = Path(tempfile.gettempdir()) / f"dl2pa-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        folder = Path(tempfile.mkdtemp(prefix="dl2pa-"))
    (folder / name).mkdir(exist_ok=True)
    return folder / name


@contextmanager
def replacing(path: Path, *, durable: bool = True, keep_mode: bool = False) -> Generator[Path]:
    """Yield a temporary path in the same folder; on success the file or folder there replaces `path`.

    Readers see the old content or the new content. On an exception the temporary path is removed and `path` is
    unchanged.

    Args:
        durable: sync a file to the disk, so that readers see one of both also after a power failure.
        keep_mode: keep the permissions of the temporary file, instead of those of the user's umask.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{path.suffix}")
    try:
        yield temporary
        if temporary.is_file():
            if not keep_mode:
                follow_umask(temporary)
            if durable:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str, *, private: bool = False, durable: bool = True) -> None:
    """Replace a text file, see `replacing`; with `private`, only the owner may read it."""
    with (
        replacing(path, durable=durable, keep_mode=True) as temporary,
        open_private(temporary, "w") if private else temporary.open("w", encoding="utf-8") as file,
    ):
        file.write(text)


def write_json(path: Path, content: Any, *, indent: int | None = None) -> None:
    """Replace a JSON file atomically; secrets are redacted."""
    write_atomically(path, json.dumps(redact_tree(content), indent=indent) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing, unreadable or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
