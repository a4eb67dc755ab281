"""Small images decoded once into a cached, memory-mapped array."""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dl2pa.errors import UserError
from pipelines import decoded, pixel_cache
from pipelines.batch import Pipeline
from pipelines.datasets.table import ImageTable
from pipelines.decoded import decode_folder
from pipelines.sampler import EvalSampler
from pipelines.transforms import Transforms

Folder = Callable[..., ImageTable]
ROOT = Path(__file__).resolve().parents[3]
SIDE = 20
SHAPE = (2, 4, 4, 3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """An empty cache folder, used for any number of images; decoding in this process."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DL2PA_CACHE", str(folder))
    monkeypatch.setattr(decoded, "_MIN_CACHED", 1)
    monkeypatch.setattr(decoded, "_CHUNK", 2)
    monkeypatch.setattr(decoded, "usable_cores", lambda: 1)
    monkeypatch.setattr(pixel_cache, "_SPARE", 0)
    monkeypatch.setattr(pixel_cache, "_POLL_S", 0.001)
    caplog.set_level(logging.INFO)
    return folder


def reference(
    drawn: Any, count: int, resampling: Image.Resampling = Image.Resampling.BILINEAR
) -> NDArray[np.uint8]:
    """Pillow's pixels of the generated images: 80 x 60, so the shorter side is the height."""
    images = []
    for i in range(count):
        image = Image.open(io.BytesIO(drawn.encoded(i))).convert("RGB")
        scaled = image.resize((80 * SIDE // 60, SIDE), resampling)
        left = round((scaled.width - SIDE) / 2)
        images.append(np.asarray(scaled.crop((left, 0, left + SIDE, SIDE))))
    return np.stack(images)


def file_in(cache: Path) -> Path:
    (file,) = cache.glob("*.pixels")
    return file


@contextmanager
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    def decode(*_: object) -> None:
        raise AssertionError("an image is decoded")

    with monkeypatch.context() as patch:
        patch.setattr(decoded, "_decode", decode)
        yield


def test_pixels_are_those_of_pillow_with_and_without_cache(
    drawn: Any, folder: Folder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = folder(7)
    expected = reference(drawn, 7)
    first = decode_folder(table, SIDE, 1)
    assert np.array_equal(first.images, expected)
    with no_decoding(monkeypatch):
        again = decode_folder(table, SIDE, 1)
    assert np.array_equal(again.images, expected)
    assert (again.fingerprint, again.classes, again.labels.tolist()) == (
        table.fingerprint,
        table.classes,
        table.labels.tolist(),
    )
    monkeypatch.setenv("DL2PA_CACHE", "")
    file_in(cache).unlink()
    assert np.array_equal(decode_folder(table, SIDE, 1).images, expected)
    assert not list(cache.glob("*.pixels"))


def test_worker_processes_decode_the_same_pixels(
    drawn: Any, folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decoded, "usable_cores", lambda: 2)
    monkeypatch.setattr(decoded, "_LOG_EVERY_S", 0.0)
    assert np.array_equal(decode_folder(folder(7), SIDE, 1).images, reference(drawn, 7))
    assert "in threads" not in caplog.text
    assert "decoded 7 of 7 images" in caplog.text


def test_worker_process_does_not_import_torch() -> None:
    code = "import sys, pipelines.decoded; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


@pytest.mark.parametrize("decoded_before", [0, 1])
def test_decoding_continues_in_threads_without_processes(
    drawn: Any,
    folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    decoded_before: int,
) -> None:
    """Where no process can be started, or one is killed for its memory."""

    def broken(work: Any, chunks: list[Any], workers: int) -> Generator[Any]:
        yield from map(work, chunks[:decoded_before])
        raise BrokenProcessPool("a process was killed")

    monkeypatch.setattr(decoded, "usable_cores", lambda: 2)
    monkeypatch.setattr(decoded, "_LOG_EVERY_S", 0.0)
    monkeypatch.setattr(decoded, "in_parallel", broken)
    assert np.array_equal(decode_folder(folder(5), SIDE, 1).images, reference(drawn, 5))
    assert "a process was killed" in caplog.text
    assert "decoded 5 of 5 images" in caplog.text


def test_few_images_are_not_cached(folder: Folder, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "_MIN_CACHED", 4)
    decode_folder(folder(3), SIDE, 1)
    assert not cache.exists()


def test_cache_depends_on_files_and_size(drawn: Any, folder: Folder, cache: Path) -> None:
    """Also on a file whose name and length stay the same."""
    length = 5000  # bytes behind the end of a JPEG do not matter
    table = folder(3, {0: drawn.encoded(0).ljust(length, b"\0")})
    decode_folder(table, SIDE, 1)
    assert decode_folder(table, 16, 1).images.shape == (3, 16, 16, 3)
    state = table.path(0).stat()
    table.path(0).write_bytes(drawn.encoded(2).ljust(length, b"\0"))
    assert table.path(0).stat().st_size == state.st_size
    os.utime(table.path(0), ns=(state.st_atime_ns, state.st_mtime_ns))
    assert np.array_equal(decode_folder(table, SIDE, 1).images[0], reference(drawn, 3)[2])
    assert len(list(cache.glob("*.pixels"))) == 3


def test_cache_depends_on_the_filter(drawn: Any, folder: Folder) -> None:
    table = folder(3)
    assert np.array_equal(decode_folder(table, SIDE, 1).images, reference(drawn, 3))
    bicubic = decode_folder(table, SIDE, 1, "bicubic").images
    assert np.array_equal(bicubic, reference(drawn, 3, Image.Resampling.BICUBIC))


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "header only": lambda file: file.write_bytes(file.read_bytes()[:4096]),
    "no JSON": lambda file: file.write_bytes(b"x" * file.stat().st_size),
    "a list": lambda file: file.write_bytes(b"[]".ljust(4096) + file.read_bytes()[4096:]),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "a changed pixel": flip_a_byte,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_cache_file_is_rebuilt(
    drawn: Any,
    folder: Folder,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    table = folder(3)
    decode_folder(table, SIDE, 1)
    DAMAGE[kind](file_in(cache))
    assert np.array_equal(decode_folder(table, SIDE, 1).images, reference(drawn, 3))
    assert f"{file_in(cache)} is not usable" in caplog.text
    if kind == "a folder":  # cannot be replaced: only the cache is lost
        return
    with no_decoding(monkeypatch):
        decode_folder(table, SIDE, 1)


def test_folder_that_cannot_be_written_only_costs_the_cache(
    drawn: Any, folder: Folder, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file")
    assert np.array_equal(decode_folder(folder(3), SIDE, 1).images, reference(drawn, 3))
    assert "Set DL2PA_CACHE to a folder with 1 MiB of free space" in caplog.text


@contextmanager
def file_size_limit(limit: int) -> Generator[None]:
    """Writing beyond the limit fails with an OSError, as on a full file system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_file_system_only_costs_the_cache(
    drawn: Any, folder: Folder, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = folder(3)
    with file_size_limit(4196):
        assert np.array_equal(decode_folder(table, SIDE, 1).images, reference(drawn, 3))
    assert "are not cached in" in caplog.text
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_file_system_is_not_filled(
    drawn: Any, folder: Folder, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pixel_cache, "_SPARE", 1 << 60)
    assert np.array_equal(decode_folder(folder(3), SIDE, 1).images, reference(drawn, 3))
    assert "MiB are free" in caplog.text
    assert not list(cache.glob("*.pixels"))


def test_unreadable_image_is_named(folder: Folder, cache: Path) -> None:
    table = folder(5, {3: b"no image"})
    with pytest.raises(UserError, match="is not an image") as caught:
        decode_folder(table, SIDE, 1)
    assert (caught.value.field, caught.value.value) == ("data.root", str(table.path(3)))
    assert not list(cache.glob("*.pixels"))


def test_too_many_open_files_are_not_a_fault_of_an_image(
    folder: Folder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = folder(5)

    def refuse(*_: Any) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(ImageTable, "read", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        decode_folder(table, SIDE, 1)
    assert not list(cache.glob("*.pixels"))


def test_pipeline_over_cached_pixels_gives_the_same_batches(
    folder: Folder, pipeline_over: Callable[..., Pipeline], recwarn: pytest.WarningsRecorder
) -> None:
    table, transforms = folder(5), Transforms(SIDE, train=False)
    first, second = (list(pipeline_over(table, "resident", transforms, EvalSampler(5, 5))) for _ in range(2))
    assert first[0].images.equal(second[0].images)
    assert not recwarn.list, "torch warns about read-only arrays"


def test_unused_files_are_removed_when_another_is_written(folder: Folder, cache: Path) -> None:
    cache.mkdir()
    for name in ("old.pixels", "old.pixels.lock", ".old.pixels.9.9.pixels", "old.txt"):
        (cache / name).write_text("")
        os.utime(cache / name, (0, 0))
    (cache / "recent.pixels").write_text("")
    decode_folder(folder(3), SIDE, 1)
    remaining = {path.name for path in cache.iterdir()}
    assert {"old.txt", "recent.pixels"} <= remaining
    assert not any(name.startswith(("old.pixels", ".old")) for name in remaining)


def ones(progress: pixel_cache.Progress, alone: bool) -> NDArray[np.uint8]:
    return np.ones(SHAPE, np.uint8)


def never(progress: pixel_cache.Progress, alone: bool) -> NDArray[np.uint8]:
    raise AssertionError("decoded twice")


class Background(threading.Thread):
    """``cached_pixels`` in a thread; a lock is per open file, so threads exclude each other like processes."""

    def __init__(self, make: pixel_cache.Make) -> None:
        super().__init__(daemon=True)
        self.make = make
        self.pixels: NDArray[np.uint8] | None = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.pixels = pixel_cache.cached_pixels("key", SHAPE, "source", self.make)
        except BaseException as error:
            self.error = error

    def result(self) -> NDArray[np.uint8]:
        self.join(60)
        assert self.error is None, self.error
        assert self.pixels is not None
        return self.pixels


@pytest.fixture
def held_lock(cache: Path) -> Generator[int]:
    """The lock of another process."""
    cache.mkdir()
    descriptor = os.open(cache / "key.pixels.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield descriptor
    os.close(descriptor)


def test_one_process_decodes_and_the_others_wait(caplog: pytest.LogCaptureFixture) -> None:
    started, finish = threading.Event(), threading.Event()

    def slow(progress: pixel_cache.Progress, alone: bool) -> NDArray[np.uint8]:
        assert alone
        progress("decoded 1 of 2 images")
        started.set()
        assert finish.wait(60)
        return np.ones(SHAPE, np.uint8)

    first = Background(slow)
    assert started.wait(60)
    others = [Background(never) for _ in range(3)]
    finish.set()
    assert all(np.array_equal(one.result(), np.ones(SHAPE)) for one in (first, *others))


def test_wait_ends_with_the_process_that_decodes(held_lock: int) -> None:
    waiting = Background(ones)
    fcntl.flock(held_lock, fcntl.LOCK_UN)
    assert np.array_equal(waiting.result(), np.ones(SHAPE))


def test_wait_without_progress_is_bounded(
    held_lock: int, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pixel_cache, "_PATIENCE_S", 0.01)
    os.pwrite(held_lock, b"process 7: decoded 1 of 2 images", 0)
    assert np.array_equal(Background(ones).result(), np.ones(SHAPE))
    assert "process 7: decoded 1 of 2 images" in caplog.text
    assert not list(cache.glob("*.pixels"))


def test_file_system_without_locks(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(37, "No locks available")

    def shared(progress: pixel_cache.Progress, alone: bool) -> NDArray[np.uint8]:
        assert not alone, "other processes may decode too"
        return np.ones(SHAPE, np.uint8)

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert np.array_equal(pixel_cache.cached_pixels("key", SHAPE, "source", shared), np.ones(SHAPE))
    assert np.array_equal(pixel_cache.cached_pixels("key", SHAPE, "source", never), np.ones(SHAPE))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DL2PA_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"DL2PA_CACHE": ""}, None),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, Path("/b/dl2pa")),
        ({"HOME": "/c"}, Path("/c/.cache/dl2pa")),
    ],
)
def test_cache_folder(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Path | None
) -> None:
    for name in ("DL2PA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert pixel_cache.cache_folder() == expected
