"""Operating system helpers: atomic writes, full disks, file locks, permissions, processes, threads and cores."""

from __future__ import annotations

import ctypes
import enum
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dl2pa import fence
from dl2pa.errors import UserError
from dl2pa.redaction import redact_tree

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here because a forked child must not load libraries
_START_S = 60.0
"""Time in which the threads of a pool must have started."""
_PIECE = 1 << 22
"""Bytes of a file that are read at once."""
_NAMES = 16
"""Number of names of this user's folder among the temporary files."""
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_FULL = {
    errno.ENOSPC: (
        "No space left",
        "Not enough free space to write",
        " requested and ",
    ),  # the last two: NumPy
    errno.EDQUOT: ("quota exceeded",),
    errno.EFBIG: ("File too large",),
}
"""Errors of a write for lack of space, and what libraries write in place of the number."""


def usable_cores() -> int:
    """CPU cores that this process may use; a container or a SLURM job may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def set_parent_death_signal(signal_number: int) -> None:
    """Ask Linux to send this process a signal when its parent ends; usable between fork and exec."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal_number)


def process_start(pid: int) -> int | None:
    """Start time of a running process of this machine, in clock ticks since boot; None for a zombie too."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def process_runs(pid: int) -> bool:
    """Whether a process of this machine is running; a zombie is not."""
    return process_start(pid) is not None


def start_thread(target: Callable[[], object], name: str) -> threading.Thread:
    """Start a daemon thread. Start threads early: later there may be too little memory for one.

    Raises:
        RuntimeError: the thread cannot be started; names the limits to raise.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        message = f"the thread {name} cannot be started ({error}): too little memory or too many processes"
        raise RuntimeError(
            f"{message}. Raise the limits of the job, the container or `ulimit -u -v`"
        ) from error
    return thread


def started_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """Thread pool with all its threads started. By default, a pool starts threads on demand; see `start_thread`."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    all_started = threading.Barrier(threads)
    list(pool.map(lambda _: all_started.wait(_START_S), range(threads)))
    return pool


class LockResult(enum.Enum):
    """Result of `try_lock`. Some network file systems do not support locks."""

    ACQUIRED = "acquired"
    HELD = "held by another process"
    UNSUPPORTED = "not supported"


def try_lock(descriptor: int) -> LockResult:
    """Try to lock an open file exclusively, without waiting."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return LockResult.HELD if error.errno in _HELD else LockResult.UNSUPPORTED
    return LockResult.ACQUIRED


def open_and_lock(path: Path) -> tuple[int, LockResult]:
    """Open or create a lock file, whose holder may remove it, and try to lock it; return the descriptor and the result.

    Raises:
        OSError: it cannot be opened.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        result = try_lock(descriptor)
        if result is LockResult.HELD or is_file_of(path, descriptor):
            return descriptor, result
        # Its holder has removed it between the two calls; a new file may have another holder.
        os.close(descriptor)


def is_file_of(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file. A lock on a removed file does not keep other processes out.

    The path is opened, because a network file system may answer `stat` from a cache.
    """
    try:
        other = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ESTALE)
    try:
        return os.path.samestat(os.fstat(descriptor), os.fstat(other))
    except OSError:  # ESTALE: another machine has removed the file
        return False
    finally:
        os.close(other)


def remove_locked(path: Path, descriptor: int) -> None:
    """Remove a lock file that this process has locked, unless the path leads to another file."""
    if is_file_of(path, descriptor):
        with suppress(OSError):
            path.unlink()


_FREE_SPACE = ". Free some space there, then the same command continues"


class DiskFull(OSError):
    """A write that failed for lack of space; the message names the folder, the bytes free and the bytes needed."""

    def __str__(self) -> str:
        return str(self.strerror)


def reason_of(error: OSError) -> str:
    """Text of an error for a warning, without what to do."""
    return str(error).removesuffix(_FREE_SPACE)


def full_disk(error: BaseException, folder: Path, needed: int, written: int = 0) -> DiskFull | None:
    """Describe an error of a write to a full disk, also in the words of a library; None for any other error.

    Args:
        needed: bytes that the write needs; 0 if unknown.
        written: bytes written before the error.
    """
    if isinstance(error, DiskFull):
        return error
    code = error.errno if isinstance(error, OSError) else None
    if code is None and not isinstance(error, UserError):
        text = str(error)
        code = next(
            (n for n, words in _FULL.items() if any(w in text for w in (*words, f"os error {n})"))), None
        )
    if code not in _FULL:
        return None
    least = f"more than {written:,} bytes are needed" if written else "more is needed"
    amount = f"{needed:,} bytes are needed" if needed else least
    reason = f"{os.strerror(code)}: {folder} has {_free(folder)}, {amount}"
    return DiskFull(code, reason + _FREE_SPACE)


def _free(folder: Path) -> str:
    try:
        state = os.statvfs(next(place for place in (folder, *folder.parents) if place.exists()))
    except OSError:
        return "an unknown number of bytes free"
    inodes = ", no free inodes" if state.f_files and not state.f_favail else ""
    return f"{state.f_bavail * state.f_frsize:,} bytes free{inodes}"


@contextmanager
def describing_full_disk(folder: Path, needed: int) -> Generator[None]:
    """Raise `DiskFull` for an error that a full disk causes.

    Args:
        needed: bytes that the writes in the context need.
    """
    try:
        yield
    except Exception as error:
        if full := full_disk(error, folder, needed):
            raise full from error
        raise


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

    Code may be loaded from it. Where another user has taken its name in the folder of temporary files, all processes
    use the next free name, and if none is free, the user's cache folder.
    """
    base = f"dl2pa-{os.getuid()}"
    folders = [
        Path(tempfile.gettempdir()) / f"{base}{end}" for end in ("", *(f"-{k}" for k in range(1, _NAMES)))
    ]
    # A name that has become free must not separate a new process from those that use a later name.
    folder = next((folder for folder in folders if _is_private(folder)), None)
    folder = folder or next((folder for folder in folders if _make_private(folder)), None) or _private_cache()
    (folder / name).mkdir(exist_ok=True)
    return folder / name


def user_cache_folder() -> Path:
    """Cache folder of dl2pa in this user's home.

    Raises:
        RuntimeError: the user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dl2pa"


def _private_cache() -> Path:
    """Private folder in the user's cache folder, with the name of this machine; if impossible, a new folder."""
    with suppress(OSError, RuntimeError):
        folder = user_cache_folder() / f"node-{socket.gethostname()}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        if _make_private(folder):
            return folder
    return Path(tempfile.mkdtemp(prefix="dl2pa-"))


def _make_private(folder: Path) -> bool:
    """Create a folder unless it exists; return whether only this user can enter it."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    return _is_private(folder)


def _is_private(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


@contextmanager
def replacing(
    path: Path, needed: int = 0, *, durable: bool = True, keep_mode: bool = False
) -> Generator[Path]:
    """Yield a temporary path in the same folder; on success the file or folder there replaces `path`.

    Readers see the old content or the new content. On an exception the temporary path is removed and `path` is
    unchanged.

    Args:
        needed: bytes that will be written, for the message about a full disk; 0 if unknown.
        durable: sync the files to the disk, so that readers see one of both also after a power failure.
        keep_mode: keep the permissions of the temporary file, instead of those of the user's umask.

    Raises:
        DiskFull: in place of an error that a full disk causes.
    """
    fence.check(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{path.suffix}")
    try:
        yield temporary
        if temporary.is_file() and not keep_mode:
            follow_umask(temporary)
        if durable:
            for file in sorted(temporary.rglob("*")) if temporary.is_dir() else [temporary]:
                if file.is_file():
                    _sync(file)
        fence.check(path)
        temporary.replace(path)
    except BaseException as error:
        written = _size(temporary)
        with suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        if full := full_disk(error, path.parent, needed, written):
            raise full from error
        raise


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _size(path: Path) -> int:
    """Bytes of a file or of the files of a folder; 0 if it is missing."""
    try:
        return sum(p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file())
    except OSError:
        return 0


def write_atomically(path: Path, text: str, *, private: bool = False, durable: bool = True) -> None:
    """Replace a text file, see `replacing`; with `private`, only the owner may read it."""
    with (
        replacing(path, len(text.encode()), durable=durable, keep_mode=True) as temporary,
        open_private(temporary, "w") if private else temporary.open("w", encoding="utf-8") as file,
    ):
        file.write(text)


def write_json(path: Path, content: Any, *, indent: int | None = None) -> None:
    """Replace a JSON file atomically; secrets are redacted."""
    write_atomically(path, json.dumps(redact_tree(content), indent=indent) + "\n")


def try_to_write(folder: Path) -> None:
    """Write a temporary file to a folder, or to the one in which it would be created.

    Some file systems, such as /proc, refuse files despite their permissions.

    Raises:
        OSError: names the folder that cannot be written.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{existing} is a file")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(error.errno, f"{existing}: {error.strerror}") from None


def sha256_of(path: Path, advance: Callable[[], object] = lambda: None) -> str:
    """SHA-256 of a file, hexadecimal.

    Args:
        advance: called after each piece of the file.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            advance()
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing, unreadable or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
