"""Batches from image files through both decoders: order, pixels, damage."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dl2pa.errors import UserError
from pipelines.batch import Batch, Pipeline
from pipelines.datasets.table import ImageTable, PathTable
from pipelines.encoded import FaultLimits
from pipelines.sampler import EvalSampler, TrainSampler
from pipelines.transforms import Transforms, draw_crop_params

Folder = Callable[..., ImageTable]
Build = Callable[..., Pipeline]
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
TRAIN = Transforms(24, train=True, trivial_augment=True, erasing=0.3)
# DALI normalizes if no transform needs pixels, and reuses its output buffers.
BOTH_TRANSFORMS = pytest.mark.parametrize(
    "transforms",
    [TRAIN, Transforms(24, train=True, erasing=0.3)],
    ids=["pixels", "normalized by the decoder"],
)


@pytest.fixture(params=["dali", "torchvision"])
def loader(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    return request.param


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.indices, y.indices)
        and torch.equal(x.images, y.images)
        and torch.equal(x.targets, y.targets)
        for x, y in zip(a, b, strict=True)
    )


def test_batches_have_the_documented_contents(folder: Folder, pipeline_over: Build, loader: str) -> None:
    dataset = folder(22)
    pipeline = pipeline_over(dataset, loader, TRAIN, TrainSampler(22, 4, 0))
    batches = list(pipeline)
    assert (pipeline.num_samples, pipeline.steps_per_epoch, len(batches)) == (22, 5, 5)
    for batch in batches:
        assert batch.images.shape == (4, 3, 24, 24)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.valid == 4
        assert batch.targets.tolist() == dataset.labels[batch.indices].tolist()
    seen = torch.cat([b.indices for b in batches]).tolist()
    assert len(set(seen)) == 20


@BOTH_TRANSFORMS
def test_epoch_can_start_at_any_step_repeatedly(
    folder: Folder, pipeline_over: Build, loader: str, transforms: Transforms
) -> None:
    """Also after an abandoned iteration whose images are already in the decoder."""
    pipeline = pipeline_over(folder(20), loader, transforms, TrainSampler(20, 4, 0))
    batches_of_epoch = list(pipeline)
    for step in (3, 1, 4):
        pipeline.start(0, step)
        assert same(list(pipeline), batches_of_epoch[step:])
        pipeline.start(1, 0)
        next(iter(pipeline))
    pipeline.start(0, 0)
    assert same(list(pipeline), batches_of_epoch)
    pipeline.start(1, 0)
    assert not same(list(pipeline), batches_of_epoch)
    pipeline.start(0, 5)
    assert list(pipeline) == []


@pytest.mark.parametrize("world", [2, 4])
def test_every_world_size_gives_the_same_pixels(
    folder: Folder, pipeline_over: Build, loader: str, world: int
) -> None:
    dataset = folder(20, {7: b"broken"})
    alone = list(pipeline_over(dataset, loader, TRAIN, TrainSampler(20, 8, 3), seed=3))
    ranks = [
        list(pipeline_over(dataset, loader, TRAIN, TrainSampler(20, 8, 3, rank, world), seed=3))
        for rank in range(world)
    ]
    for step, batch in enumerate(alone):
        assert torch.equal(torch.cat([r[step].images for r in ranks]), batch.images)
        assert torch.equal(torch.cat([r[step].indices for r in ranks]), batch.indices)


@pytest.mark.parametrize("world", [1, 3])
def test_validation_pads_the_last_batch(
    folder: Folder, pipeline_over: Build, loader: str, world: int
) -> None:
    dataset = folder(7)
    transforms = Transforms(24, train=False, eval_resize=28)
    seen: list[int] = []
    for rank in range(world):
        batches = list(pipeline_over(dataset, loader, transforms, EvalSampler(7, 6, rank, world)))
        assert len(batches) == 2
        for batch in batches:
            assert len(batch.images) == 6 // world
            seen += batch.indices[: batch.valid].tolist()
    assert sorted(seen) == list(range(7))


def of(files: list[Path]) -> ImageTable:
    root = files[0].parents[1]
    names = [str(f.relative_to(root)) for f in files]
    lengths = [f.stat().st_size for f in files]
    return ImageTable.of(root, PathTable.of(names), lengths, [0] * len(files), ("photograph",))


# DALI rounds differently when resizing, and does not smooth color across the border of the crop.
TOLERANCE = {"dali": 0.3, "torchvision": 0.0}
MAX_OUTLIERS = {"dali": 0.05, "torchvision": 0.0}
"""Allowed fraction of values that differ by more than one gray level, at the border of a crop."""


def assert_alike(images: torch.Tensor, expected: torch.Tensor, loader: str, name: str, border: bool) -> None:
    difference = (images - expected).abs()
    assert difference.mean() <= TOLERANCE[loader] + 1e-3, name
    outliers = (difference > 1 + 1e-3).float().mean()
    assert outliers <= (MAX_OUTLIERS[loader] if border else 0), name


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_matches_torchvision(
    photographs: list[Path], pipeline_over: Build, loader: str, interpolation: str
) -> None:
    """Mean absolute difference on real photographs, in gray levels of 255."""
    transforms = Transforms(224, train=False, eval_resize=256, interpolation=interpolation, **PLAIN)
    batches = list(pipeline_over(of(photographs), loader, transforms, EvalSampler(len(photographs), 4)))
    resize = v2.Resize(256, v2.InterpolationMode(interpolation))
    transform = v2.Compose([resize, v2.CenterCrop(224), v2.PILToTensor()])
    images = torch.cat([b.images[: b.valid] for b in batches]) * 255
    for image, file in zip(images, photographs, strict=True):
        expected = transform(Image.open(file).convert("RGB")).float()
        # Pillow rounds between its two passes, which the negative weights of a bicubic filter amplify.
        assert_alike(image, expected, loader, file.name, border=interpolation == "bicubic")


def test_training_crops_match_torchvision(photographs: list[Path], pipeline_over: Build, loader: str) -> None:
    transforms = Transforms(112, train=True, **PLAIN)
    (batch,) = pipeline_over(
        of(photographs), loader, transforms, TrainSampler(len(photographs), len(photographs), 0)
    )
    mirrored = 0
    for pixels, sample in zip(batch.images * 255, batch.indices.tolist(), strict=True):
        image = Image.open(photographs[sample]).convert("RGB")
        size = np.array([[image.height, image.width]])
        crop = draw_crop_params(transforms, 0, 0, np.array([sample]), size)
        window = crop.window[0].tolist()
        expected = v2.functional.pil_to_tensor(v2.functional.resized_crop(image, *window, [112, 112])).float()
        mirrored += int(crop.flip[0])
        expected = expected.flip(2) if crop.flip[0] else expected
        assert_alike(pixels, expected, loader, photographs[sample].name, border=True)
    assert 0 < mirrored < len(photographs)


def test_camera_orientation_is_ignored(drawn: Any, folder: Folder, pipeline_over: Build, loader: str) -> None:
    """As in torchvision's ImageFolder; crops are drawn for the stored orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = folder(2, {i: drawn.encoded(i, exif=exif) for i in range(2)})
    transforms = Transforms(32, train=False, eval_resize=40)
    plain = list(pipeline_over(folder(2), loader, transforms, EvalSampler(2, 2)))
    assert torch.equal(
        next(iter(pipeline_over(rotated, loader, transforms, EvalSampler(2, 2)))).images, plain[0].images
    )


@pytest.mark.parametrize(
    ("form", "mode"),
    [("JPEG", "L"), ("PNG", "L"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("BMP", "RGB")],
)
def test_all_modes_are_converted_to_three_channels(
    drawn: Any, folder: Folder, pipeline_over: Build, loader: str, form: str, mode: str
) -> None:
    dataset = folder(2, {i: drawn.encoded(i, form, mode) for i in range(2)})
    transforms = Transforms(32, train=False, eval_resize=40, **PLAIN)
    (batch,) = pipeline_over(dataset, loader, transforms, EvalSampler(2, 2))
    for i, image in enumerate(batch.images * 255):
        transform = v2.Compose([v2.Resize(40), v2.CenterCrop(32), v2.PILToTensor()])
        expected = transform(drawn.image(i).convert(mode).convert("RGB")).float()
        assert (image - expected).abs().mean() < 4


@pytest.mark.parametrize(("form", "options"), [("cmyk", {}), ("progressive", {"progressive": True})])
def test_cmyk_and_progressive_jpegs_match_torchvision(
    drawn: Any, folder: Folder, pipeline_over: Build, loader: str, form: str, options: dict[str, Any]
) -> None:
    data = drawn.encoded(0, "JPEG", "CMYK" if form == "cmyk" else "RGB", **options)
    transforms = Transforms(32, train=False, eval_resize=40, **PLAIN)
    (batch,) = pipeline_over(folder(2, {0: data}), loader, transforms, EvalSampler(2, 2))
    transform = v2.Compose([v2.Resize(40), v2.CenterCrop(32), v2.PILToTensor()])
    expected = transform(Image.open(io.BytesIO(data)).convert("RGB")).float()
    assert (batch.images[0] * 255 - expected).abs().mean() <= TOLERANCE[loader] + 1e-3


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(1, 1), (80, 1)])
def test_tiny_images_are_resized(
    folder: Folder, pipeline_over: Build, loader: str, form: str, size: tuple[int, int]
) -> None:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 120, 40)).save(file, form)
    for transforms, sampler in (
        (Transforms(32, train=False, eval_resize=40, **PLAIN), EvalSampler(2, 2)),
        (TRAIN, None),
    ):
        table = folder(2, {i: file.getvalue() for i in range(2)})
        (batch,) = pipeline_over(table, loader, transforms, sampler or TrainSampler(2, 2, 0))
        assert torch.isfinite(batch.images).all() and batch.valid == 2
        if sampler:
            level = batch.images.mean((0, 2, 3)) * 255
            assert (level - torch.tensor([200.0, 120.0, 40.0])).abs().max() < 3


def test_16_bit_pngs_are_scaled_by_dali_and_clipped_by_pillow(
    folder: Folder, pipeline_over: Build, loader: str
) -> None:
    """A documented difference: Pillow, and so torchvision, clips every level above 255 to white."""
    file = io.BytesIO()
    Image.fromarray(np.full((40, 40), 25_700, dtype=np.uint16)).save(file, "PNG")
    transforms = Transforms(32, train=False, eval_resize=40, **PLAIN)
    (batch,) = pipeline_over(folder(2, {0: file.getvalue()}), loader, transforms, EvalSampler(2, 2))
    expected = {"dali": 100.0, "torchvision": 255.0}[loader]
    assert (batch.images[0] * 255 - expected).abs().max() <= 1.001


def wrong_component(drawn: Any) -> bytes:
    """A complete progressive JPEG whose third scan refers to a missing component."""
    parts = drawn.encoded(5, progressive=True).split(b"\xff\xda")
    parts[3] = parts[3][:3] + b"\x5e" + parts[3][4:]
    return b"\xff\xda".join(parts)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def overwritten(data: bytes) -> bytes:
    return data[: len(data) // 2] + b"\x55" * 40 + data[len(data) // 2 + 40 :]


# Files with a valid header that the decoder rejects.
DAMAGED: dict[str, Callable[[Any], bytes]] = {
    "jpeg damaged behind its header": wrong_component,
    "jpeg without quantization tables": lambda drawn: drawn.encoded(5).replace(b"\xff\xdb", b"\xff\xfe"),
    "png cut": lambda drawn: cut(drawn.encoded(5, "PNG")),
    "png with wrong data": lambda drawn: overwritten(drawn.encoded(5, "PNG")),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_image_rejected_by_the_decoder_is_replaced(
    drawn: Any, folder: Folder, pipeline_over: Build, loader: str, kind: str
) -> None:
    dataset = folder(20, {5: DAMAGED[kind](drawn)})
    sampler = TrainSampler(20, 4, 0)
    pipeline = pipeline_over(dataset, loader, TRAIN, sampler)
    batches = list(pipeline)
    assert pipeline.bad_images() == [str(dataset.path(5))]
    assert len(batches) == 5
    for step, batch in enumerate(batches):
        requested = sampler.indices(0, step)
        changed = batch.indices.numpy() != requested
        assert (requested[changed] == 5).all()
        assert 5 not in batch.indices.tolist()
    empty = pipeline_over(folder(20, {5: b""}), loader, TRAIN, sampler)
    assert same(list(empty), batches), "the substitute is the same as for an unreadable file"


@pytest.mark.parametrize("kind", DAMAGED)
def test_rejected_validation_image_raises_an_error(
    drawn: Any, folder: Folder, pipeline_over: Build, loader: str, kind: str
) -> None:
    dataset = folder(20, {5: DAMAGED[kind](drawn)})
    with pytest.raises(UserError) as caught:
        list(pipeline_over(dataset, loader, Transforms(24, train=False), EvalSampler(20, 4)))
    assert caught.value.field == "data.val_root"
    assert caught.value.value == str(dataset.path(5))


def test_more_rejected_images_than_allowed_raise_an_error(
    drawn: Any, folder: Folder, pipeline_over: Build, loader: str
) -> None:
    bad = DAMAGED["png cut"](drawn)
    dataset = folder(20, {3: bad, 5: bad})
    pipeline = pipeline_over(dataset, loader, TRAIN, TrainSampler(20, 4, 0), limits=FaultLimits(0.05))
    with pytest.raises(UserError) as caught:
        list(pipeline)
    assert caught.value.field == "data.max_bad_fraction"


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("batches", "any"),
        ("everything", "out of memory"),
        ("everything", "encountered:\n\nCUDA allocation failed"),
    ],
)
def test_decoder_error_not_caused_by_an_image_is_raised(
    folder: Folder, pipeline_over: Build, fails: str, message: str
) -> None:
    """The decoder fails on batches, or also on single images, like a device that is out of memory."""
    pipeline = pipeline_over(folder(20), "torchvision", TRAIN, TrainSampler(20, 4, 0))

    class Failing:
        def __init__(self) -> None:
            self.current: list[Any] = []

        def decode(self, source: Any) -> Any:
            for step in source:
                self.current = [step]
                if len(step.samples) > 1 or fails == "everything":
                    raise RuntimeError(message)
                yield step, torch.zeros(1, 24, 24, 3, dtype=torch.uint8)

        def in_flight(self) -> list[Any]:
            return self.current

        def close(self) -> None:
            pass

    pipeline._decoder = Failing()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=message.partition(":")[0]):
        list(pipeline)
    assert pipeline.bad_images() == []
