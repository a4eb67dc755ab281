"""Reading encoded images: unreadable files, substitutes and limits."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dl2pa.errors import UserError
from pipelines.datasets.table import ImageTable
from pipelines.encoded import EncodedStream, FaultLimits, ImageReader
from pipelines.header import image_size
from pipelines.images import BadImage
from pipelines.readers import ReaderPool
from pipelines.sampler import TrainSampler
from pipelines.transforms import Transforms, draw_augmentation, draw_crop_params

Folder = Callable[..., ImageTable]
TRAIN = Transforms(16, train=True)
EVAL = Transforms(16, train=False, eval_resize=16)


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"comment": b"\xff\xc0" * 40}),
        ("JPEG", "RGB", {"restart_marker_blocks": 1}),
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("WEBP", "RGB", {}),
        ("BMP", "RGB", {}),
    ],
)
def test_image_size_is_read_from_the_header(
    drawn: Any, form: str, mode: str, options: dict[str, Any]
) -> None:
    assert image_size(drawn.encoded(1, form, mode, **options)) == (60, 80)


def test_bytes_after_the_end_of_a_jpeg_are_ignored(drawn: Any) -> None:
    for tail in (b"\0" * 10, b"\0" * 5000):
        assert image_size(drawn.encoded(1) + tail) == (60, 80)


def with_size(data: bytes, height: int, width: int) -> bytes:
    return data.replace(struct.pack(">HH", 60, 80), struct.pack(">HH", height, width))


BAD: dict[str, Callable[[Any], bytes]] = {
    "empty": lambda drawn: b"",
    "one byte": lambda drawn: b"\xff",
    "a web page": lambda drawn: b"<html>404 not found</html>" * 9,
    "zeros": lambda drawn: b"\0" * 3000,
    "jpeg cut in its data": lambda drawn: drawn.encoded(1)[:-300],
    "jpeg cut in its header": lambda drawn: drawn.encoded(1)[:100],
    "jpeg of two bytes": lambda drawn: b"\xff\xd8",
    "jpeg without a frame": lambda drawn: b"\xff\xd8\xff\xd9",
    "jpeg of no height": lambda drawn: with_size(drawn.encoded(1), 0, 80),
    "jpeg of four gigapixels": lambda drawn: with_size(drawn.encoded(1), 65_000, 65_000),
    "png cut in its header": lambda drawn: drawn.encoded(1, "PNG")[:20],
    "webp cut": lambda drawn: drawn.encoded(1, "WEBP")[:200],
}


@pytest.mark.parametrize("kind", BAD)
def test_unreadable_training_image_is_replaced_and_logged(
    drawn: Any, folder: Folder, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    reader = ImageReader(folder(8, {5: BAD[kind](drawn)}), TRAIN, 0, FaultLimits(0.5))
    used, data, size = reader.fetch(0, 5)
    assert used != 5
    assert size == (60, 80)
    assert data.tobytes() == drawn.encoded(used)
    assert list(reader.bad) == [5]
    assert str(reader.dataset.path(5)) in caplog.text
    assert " at 0x" not in caplog.text


@pytest.mark.parametrize("kind", BAD)
def test_unreadable_validation_image_raises_an_error(drawn: Any, folder: Folder, kind: str) -> None:
    reader = ImageReader(folder(8, {5: BAD[kind](drawn)}), EVAL, 0, FaultLimits(0.5))
    with pytest.raises(UserError) as caught:
        reader.fetch(0, 5)
    assert caught.value.field == "data.val_root"
    assert caught.value.value == str(reader.dataset.path(5))


def test_too_many_open_files_are_not_a_fault_of_an_image(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ImageReader(folder(8), TRAIN, 0, FaultLimits(0.5))

    def refuse(*_: Any) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(ImageTable, "read", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        reader.fetch(0, 3)
    assert reader.bad == {}


def test_missing_file_is_replaced(folder: Folder) -> None:
    reader = ImageReader(folder(8), TRAIN, 0, FaultLimits(0.5))
    reader.dataset.path(3).unlink()
    used, _, _ = reader.fetch(0, 3)
    assert used != 3
    assert "No such file" in reader.bad[3]


def test_readable_image_is_returned_unchanged(drawn: Any, folder: Folder) -> None:
    reader = ImageReader(folder(8), TRAIN, 0, FaultLimits(0.5))
    used, data, size = reader.fetch(0, 2)
    assert (used, size, data.tobytes()) == (2, (60, 80), drawn.encoded(2))
    assert reader.bad == {}


def test_substitute_depends_only_on_seed_epoch_and_sample(folder: Folder) -> None:
    dataset = folder(40, dict.fromkeys(range(20), b""))

    def substitutes(epoch: int, seed: int, samples: list[int]) -> dict[int, int]:
        reader = ImageReader(dataset, TRAIN, seed, FaultLimits(1.0))
        return {sample: reader.fetch(epoch, sample)[0] for sample in samples}

    samples = list(range(20))
    first = substitutes(0, 0, samples)
    assert substitutes(0, 0, samples[::-1]) == first
    assert all(used >= 20 for used in first.values())
    assert len(set(first.values())) > 5
    assert substitutes(1, 0, samples) != first
    assert substitutes(0, 1, samples) != first


@pytest.mark.parametrize(("fraction", "allowed"), [(0.0, 0), (0.01, 1), (0.1, 4), (0.24, 9)])
def test_more_unreadable_images_than_allowed_raise_an_error(
    folder: Folder, fraction: float, allowed: int
) -> None:
    reader = ImageReader(folder(40, dict.fromkeys(range(20), b"")), TRAIN, 0, FaultLimits(fraction))
    for sample in range(allowed):
        reader.mark_bad(sample, "is empty")
    with pytest.raises(UserError) as caught:
        reader.mark_bad(allowed, "is empty")
    assert caught.value.field == "data.max_bad_fraction"
    assert caught.value.value == allowed + 1
    assert str(reader.dataset.path(allowed)) in caught.value.message


def test_unreadable_image_is_counted_once(folder: Folder) -> None:
    reader = ImageReader(folder(40, {3: b""}), TRAIN, 0, FaultLimits(0.01))
    assert [reader.fetch(epoch, 3)[0] != 3 for epoch in range(5)] == [True] * 5
    assert len(reader.bad) == 1


def test_data_set_without_readable_images_is_refused(folder: Folder) -> None:
    reader = ImageReader(folder(4, dict.fromkeys(range(4), b"")), TRAIN, 0, FaultLimits(1.0))
    with pytest.raises(UserError) as caught:
        reader.fetch(0, 0)
    assert caught.value.field == "data.root"


def test_text_file_is_reported_as_not_an_image() -> None:
    with pytest.raises(BadImage, match=r"^is not an image$"):
        image_size(b"plain text, not an image")


@pytest.mark.parametrize("threads", [1, 3])
def test_stream_yields_all_steps_in_order_from_any_step(folder: Folder, threads: int) -> None:
    sampler = TrainSampler(20, 4, 0)
    reader = ImageReader(folder(20, {7: b""}), TRAIN, 0, FaultLimits(0.5))
    stream = EncodedStream(reader, sampler.indices, sampler.steps_per_epoch, threads)
    steps = list(stream.steps(2, 0))
    assert [step.step for step in steps] == [0, 1, 2, 3, 4]
    requested = [sampler.indices(2, step) for step in range(5)]
    for step, samples in zip(steps, requested, strict=True):
        changed = step.samples != samples
        assert (samples[changed] == 7).all()
        assert [d.tobytes() for d in step.data] == [reader.dataset.read(i) for i in step.samples.tolist()]
    for step, again in zip(steps[3:], stream.steps(2, 3), strict=True):
        assert np.array_equal(step.samples, again.samples)
        assert np.array_equal(step.crop.window, again.crop.window)
    stream.close()


def test_error_in_a_reader_thread_is_raised(folder: Folder) -> None:
    sampler = TrainSampler(20, 4, 0)
    bad = int(sampler.indices(0, 2)[1])
    stream = EncodedStream(
        ImageReader(folder(20, {bad: b""}), EVAL, 0, FaultLimits(0.5)),
        sampler.indices,
        sampler.steps_per_epoch,
        2,
    )
    seen = []
    with pytest.raises(UserError, match="is empty"):
        seen.extend(stream.steps(0, 0))
    stream.close()


def test_steps_before_an_unreadable_image_are_yielded(folder: Folder) -> None:
    """Also if their crops are drawn together with those of later steps."""
    sampler = TrainSampler(20, 4, 0)
    bad = int(sampler.indices(0, 2)[1])
    reader = ImageReader(folder(20, {bad: b""}), EVAL, 0, FaultLimits(0.5))
    stream = EncodedStream(reader, sampler.indices, sampler.steps_per_epoch, 2)
    seen: list[int] = []
    with pytest.raises(UserError, match="is empty"):
        for step in stream.steps(0, 0):
            seen.append(step.step)
    assert seen == [0, 1]
    stream.close()


def test_random_numbers_do_not_depend_on_the_steps_drawn_together(folder: Folder) -> None:
    sampler = TrainSampler(20, 4, 0)
    jitter = 0.4, 0.4, 0.4, 0.1
    transforms = Transforms(16, train=True, rand_augment=2, color_jitter=jitter, erasing=0.5)
    reader = ImageReader(folder(20), transforms, 0, FaultLimits(0.5))
    stream = EncodedStream(reader, sampler.indices, sampler.steps_per_epoch, 1)
    for step in stream.steps(0, 0):
        sizes = np.full((4, 2), (60, 80))
        alone = draw_crop_params(transforms, 0, 0, sampler.indices(0, step.step), sizes)
        draws = draw_augmentation(transforms, 0, 0, sampler.indices(0, step.step))
        assert step.draws is not None
        assert np.array_equal(step.draws.boxes, draws.boxes)
        for together, expected in ((step.crop, alone), *zip(step.draws.ops, draws.ops, strict=True)):
            for name, values in vars(expected).items():
                assert np.array_equal(getattr(together, name), values)
    stream.close()


def test_a_closed_pool_cancels_jobs() -> None:
    pool = ReaderPool(1)
    pool.close()
    assert pool.submit(lambda: 1).cancelled()
