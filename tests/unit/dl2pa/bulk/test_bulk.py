"""`dl2pa embed` and `dl2pa predict` on many images: the results of `Classifier`, unreadable images, continuation."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dl2pa.api import load
from dl2pa.bulk import embeddings, ranks
from dl2pa.bulk.classifier import BulkClassifier
from dl2pa.bulk.embeddings import Columns, EmbeddingFile
from dl2pa.commands.many_images import are_small
from dl2pa.config import parse_config
from dl2pa.errors import UserError
from dl2pa.model.inference import Classifier, load_classifier
from dl2pa.model.model import build_model
from dl2pa.model.saved import save_classifier
from pipelines.batch import Pipeline
from pipelines.build import build_pipeline
from pipelines.bulk import LOADERS, BulkOptions, open_batches
from pipelines.datasets.named import find_images
from pipelines.images import convert_to_png
from pipelines.sampler import EvalSampler
from pipelines.transforms import Transforms
from support.commands import run_here

CLASSES = ("a", "b", "c")
COUNT = 70
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and 70 images of various sizes in the class folders a and x."""
    folder = tmp_path_factory.mktemp("bulk")
    settings = parse_config(
        {
            "data": {"dataset": "imagefolder", "num_classes": 3, "image_size": 8, "eval_resize": 10},
            "model": {"backbone": "resnet8", "embedding_dim": 4, "widths": [4, 4, 4]},
        }
    )
    torch.manual_seed(0)
    save_classifier(folder / "model.safetensors", build_model(settings, 3), settings, CLASSES)
    pixels = np.random.default_rng(1).integers(0, 256, (COUNT, 14, 12, 3), dtype=np.uint8)
    for i in range(COUNT):
        file = folder / "images" / "ax"[i % 2] / f"{i:02d}.{('png', 'jpg')[i % 3 == 0]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i, : 10 + i % 5]).save(file)
    return folder


@pytest.fixture
def files(place: Path) -> list[Path]:
    return sorted((place / "images").rglob("*.*"))


@pytest.fixture
def classifier(place: Path) -> Classifier:
    return load_classifier(place)


@pytest.fixture
def damaged(place: Path, files: list[Path], tmp_path: Path) -> Path:
    """The images, of which 2 to 4 are damaged: a text, a cut JPEG and a cut PNG without its end."""
    for file in files:
        target = tmp_path / "images" / file.relative_to(place / "images")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    (tmp_path / "images/a/02.png").write_text("no image")
    jpeg = tmp_path / "images/a/06.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-100])
    png = bytearray((tmp_path / "images/a/04.png").read_bytes())
    png[60:90] = bytes(30)
    (tmp_path / "images/a/04.png").write_bytes(png)
    return tmp_path / "images"


def predict(place: Path, *arguments: object) -> Any:
    return run_here("predict", place, *arguments, "--device", "cpu")


def embed(place: Path, *arguments: object) -> Any:
    return run_here("embed", place, *arguments, "--device", "cpu")


@pytest.mark.parametrize("loader", LOADERS)
def test_images_have_the_pixels_of_an_evaluation(classifier: Classifier, place: Path, loader: str) -> None:
    table = find_images([str(place / "images")]).table()
    prepared = classifier.description["preprocessing"]
    mean, std = tuple(prepared["mean"]), tuple(prepared["std"])
    transforms = Transforms(8, train=False, eval_resize=10, mean=mean, std=std)
    pipeline: Pipeline = build_pipeline(
        table, transforms, EvalSampler(COUNT, 32), loader=loader, seed=5, device=CPU, threads=2
    )
    pipeline.start(0)
    with open_batches(table, prepared, BulkOptions(32, 2, loader), CPU) as batches:
        for ours, theirs in zip(batches, pipeline, strict=True):
            assert torch.equal(ours.images, theirs.images[: theirs.valid])
            assert ours.images.is_contiguous(memory_format=torch.channels_last)
            assert ours.samples.tolist() == theirs.indices[: theirs.valid].tolist()
    pipeline.close()


def test_dali_leaves_unusual_images_to_pillow(classifier: Classifier, tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (10, 10, 4), dtype=np.uint8)
    rgba, deep = Image.fromarray(pixels), Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
    rgba.save(tmp_path / "alpha.png")
    rgba.convert("RGB").quantize(16).save(tmp_path / "palette.png")
    deep.save(tmp_path / "16bit.png")
    rgba.convert("L").save(tmp_path / "transparent.png", transparency=7)
    rgba.convert("LA").save(tmp_path / "gray_alpha.png")
    rgba.convert("CMYK").save(tmp_path / "cmyk.jpg")
    rgba.save(tmp_path / "alpha.webp", lossless=True)
    rgba.convert("RGB").save(tmp_path / "plain.bmp")
    rgba.convert("RGB").save(tmp_path / "rgb.png")
    rgba.convert("L").save(tmp_path / "gray.jpg")
    table = find_images([str(tmp_path)]).table()
    prepared = {**classifier.description["preprocessing"], "image_size": 10, "resize_shorter_side": 10}
    images: list[torch.Tensor] = []
    for loader in LOADERS:
        with open_batches(table, prepared, BulkOptions(16, 2, loader), CPU) as batches:
            (batch,) = batches
        assert batch.failures == {}
        images.append(batch.images)
    assert len(images[0]) == 10
    assert torch.allclose(*images, atol=1e-5)  # a gray level is 1/255, divided by the SD


def test_large_images_stay_compressed_until_dali_decodes_them(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.bulk._MAX_UNCOMPRESSED", 200)
    passed: list[bytes] = []

    def keep(data: bytes) -> bytes:
        passed.append(convert_to_png(data))
        return passed[-1]

    monkeypatch.setattr("pipelines.bulk.convert_to_png", keep)
    pixels = np.random.default_rng(2).integers(0, 256, (15, 15, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.bmp")
    Image.fromarray(pixels[:10, :10]).save(tmp_path / "small.bmp")
    table = find_images([str(tmp_path)]).table()
    prepared = classifier.description["preprocessing"]
    with open_batches(table, prepared, BulkOptions(16, 2, "dali"), CPU) as batches:
        (batch,) = batches
    assert (len(batch.images), len(passed)) == (2, 1)


def test_dali_is_the_default_for_small_jpeg_and_png_files(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4))
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.JPG", "jpeg")

    def uses_dali() -> bool:
        images = find_images([str(tmp_path)])
        return are_small(images, images.table())

    assert uses_dali()
    image.save(tmp_path / "c.webp")
    assert not uses_dali()
    (tmp_path / "c.webp").unlink()
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate((1 << 20) + 1)
    assert not uses_dali()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_embeddings_are_those_of_the_classifier(
    suffix: str, dtype: str, place: Path, files: list[Path], classifier: Classifier, tmp_path: Path
) -> None:
    out = tmp_path / f"e.{suffix}"
    options = ("--dtype", dtype, "--loader", "torchvision", "--json")
    done = embed(place, place / "images", "--out", out, *options)
    assert done.code == 0, done.error
    assert (done.result["images"], done.result["dim"], done.result["skipped"]) == (COUNT, 4, [])
    expected = classifier.embed(files).astype(dtype)
    if suffix == "npz":
        with np.load(out, allow_pickle=False) as stored:
            columns: dict[str, Any] = {name: stored[name].tolist() for name in ("path", "class", "label")}
            vectors = stored["embedding"]
    else:
        columns = pq.read_table(out).to_pydict()
        vectors = np.array(columns["embedding"], dtype)
    assert vectors.dtype == dtype
    assert np.array_equal(vectors, expected)
    assert columns["path"] == [str(file) for file in files]
    assert columns["class"] == [file.parent.name for file in files]
    assert columns["label"] == [0 if file.parent.name == "a" else -1 for file in files]
    assert list(tmp_path.iterdir()) == [out]


def read_rows(out: Path) -> list[tuple[str, list[str], list[float]]]:
    """Path, classes and probabilities of each row of a file of predictions."""
    if out.suffix == ".jsonl":
        rows = map(json.loads, out.read_text().splitlines())
        return [
            (row["image"], [g["class"] for g in row["top"]], [g["probability"] for g in row["top"]])
            for row in rows
        ]
    parquet = out.suffix == ".parquet"
    table = pq.read_table(out).to_pylist() if parquet else list(csv.DictReader(out.open(newline="")))
    return [
        (row["path"], [row[f"class_{i}"] for i in (1, 2)], [float(row[f"probability_{i}"]) for i in (1, 2)])
        for row in table
    ]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_predictions_are_those_of_the_classifier(
    suffix: str, place: Path, files: list[Path], classifier: Classifier, tmp_path: Path
) -> None:
    out = tmp_path / f"p.{suffix}"
    options = ("--top", "2", "--loader", "torchvision", "--json")
    done = predict(place, place / "images", "--out", out, *options)
    assert done.code == 0, done.error
    tops = classifier.predict(files).top(2)
    rows = read_rows(out)
    assert [path for path, _, _ in rows] == [str(file) for file in files]
    assert [names for _, names, _ in rows] == [[g.name for g in top] for top in tops]
    values = np.array([values for _, _, values in rows], np.float32)
    assert np.array_equal(values, np.array([[g.probability for g in top] for top in tops], np.float32))


@pytest.mark.parametrize("lists", [["@LIST"], ["--list", "LIST"]])
def test_a_list_is_predicted_in_its_order(
    lists: list[str], place: Path, files: list[Path], tmp_path: Path
) -> None:
    chosen = [str(file.relative_to(place)) for file in files[5:2:-1]]
    (tmp_path / "names").write_text("\n".join(chosen))
    words = [word.replace("LIST", str(tmp_path / "names")) for word in lists]
    done = predict(place, *words, "--root", place, "--json")
    assert done.code == 0, done.error
    assert [row["image"] for row in done.result["predictions"]] == [str(place / name) for name in chosen]


@pytest.mark.parametrize("loader", LOADERS)
def test_unreadable_images_are_listed_and_skipped(
    place: Path, damaged: Path, tmp_path: Path, loader: str
) -> None:
    out = tmp_path / "p.csv"
    done = predict(place, damaged, "--out", out, "--batch-size", "8", "--loader", loader)
    assert done.code == 1
    bad = [str(damaged / "a" / name) for name in ("02.png", "04.png", "06.jpg")]
    lines = [line for line in done.error.splitlines() if line.startswith("skipped ")]
    assert [line.split(": ")[0] for line in lines] == [f"skipped {path}" for path in bad]
    assert "is not an image" in lines[0]
    assert lines[1].endswith("04.png: cannot be decoded (broken data stream when reading image file)")
    assert lines[2].endswith("06.jpg: cannot be decoded (image file is truncated (41 bytes not processed))")
    assert "3 of 70 images could not be read" in done.error
    paths = [path for path, _, _ in read_rows(out)]
    assert len(paths) == COUNT - 3
    assert not set(bad) & set(paths)
    whole = predict(
        place, place / "images", "--out", tmp_path / "w.csv", "--batch-size", "8", "--loader", loader
    )
    assert whole.code == 0
    expected = [
        row for row in read_rows(tmp_path / "w.csv") if row[0].replace(str(place), str(tmp_path)) in paths
    ]
    for (_, names, values), (_, wanted, probabilities) in zip(read_rows(out), expected, strict=True):
        assert names == wanted
        assert values == pytest.approx(probabilities, abs=1e-6)
    embedded = embed(place, damaged, "--out", tmp_path / "e.npz", "--loader", loader, "--json")
    assert embedded.code == 1
    assert [row["image"] for row in embedded.result["skipped"]] == bad
    assert (embedded.result["images"], embedded.result["failed"]) == (COUNT - 3, 3)


def test_images_without_a_readable_one_give_an_empty_file(place: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    for suffix in ("csv", "jsonl", "parquet"):
        done = predict(place, tmp_path / "a.png", "--out", tmp_path / f"p.{suffix}")
        assert (done.code, read_rows(tmp_path / f"p.{suffix}")) == (1, [])
    for suffix in ("npz", "parquet"):
        assert embed(place, tmp_path / "a.png", "--out", tmp_path / f"e.{suffix}").code == 1
    assert np.load(tmp_path / "e.npz")["embedding"].shape == (0, 4)


def test_few_images_are_printed_and_other_files_refused(
    place: Path, files: list[Path], damaged: Path, classifier: Classifier
) -> None:
    done = predict(place, *files[:2])
    assert done.code == 0
    first = classifier.predict(files[:2]).top(1)[0][0]
    assert done.output.startswith(f"{files[0]}: {first.name} {100 * first.probability:.1f} %, ")
    assert len(done.output.splitlines()) == 2
    refused = predict(place, files[0], damaged / "a/02.png", "--json")
    assert (refused.code, refused.result["error"]["field"]) == (2, "image")
    folder = predict(place, damaged, "--json")
    assert (folder.code, len(folder.result["predictions"]), len(folder.result["skipped"])) == (
        1,
        COUNT - 3,
        3,
    )


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path) -> Callable[..., Any]:
    """``chunked(stop, batch)``: embed to e.npz in chunks of 32, interrupted when `stop` images are done."""
    monkeypatch.setattr(embeddings, "_IMAGES", 32)
    images = find_images([str(place / "images")])
    columns = Columns(images.paths, None, None)

    def run(stop: int | None = None, batch: int = 16, out: str = "e.npz", loader: str = "dali") -> list[int]:
        seen: list[int] = []

        def progress(done: int, total: int) -> None:
            seen.append(done)
            if done == stop:
                raise KeyboardInterrupt

        bulk = BulkClassifier(load_classifier(place), BulkOptions(batch, 2, loader))
        EmbeddingFile(tmp_path / out, "float32").compute(bulk, images.table(), columns, progress)
        return seen

    return run


def test_a_stopped_command_continues_with_the_same_bits(chunked: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        chunked(stop=48)
    assert not (tmp_path / "e.npz").exists()
    assert chunked() == [32, 48, 64, 70]
    assert not (tmp_path / "e.npz.parts").exists()
    assert chunked(out="whole.npz") == [0, 16, 32, 48, 64, 70]
    with np.load(tmp_path / "e.npz") as first, np.load(tmp_path / "whole.npz") as second:
        assert sorted(first) == ["embedding", "path"]
        for name in first:
            assert np.array_equal(first[name], second[name])


def test_several_processes_embed_with_the_same_bits(
    chunked: Callable[..., Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_turn(modules: object, job: dict[str, Any], nproc: int, folder: Path) -> None:
        (folder / "job.json").write_text(json.dumps(job))
        for rank in range(nproc):
            for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", nproc)):
                monkeypatch.setenv(name, str(value))
            assert ranks.main([str(folder)]) == 0
            written.append(sorted(path.stem for path in tmp_path.glob("e.npz.parts/*.npz")))
        for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)

    written: list[list[str]] = []
    threads = torch.get_num_threads()
    monkeypatch.setattr(ranks, "run_ranks", in_turn)
    monkeypatch.setattr("dl2pa.process.die_with_parent", lambda: None)
    chunked(out="whole.npz")  # chunks of 32 images
    done = embed(
        place, place / "images", "--out", tmp_path / "e.npz", "--nproc", "2", "--batch-size", "16", "--json"
    )
    torch.set_num_threads(threads)
    assert done.code == 0, done.error
    assert (done.result["images"], done.result["failed"]) == (COUNT, 0)
    assert written == [["000000", "000002"], ["000000", "000001", "000002"]]
    with np.load(tmp_path / "e.npz") as first, np.load(tmp_path / "whole.npz") as second:
        assert np.array_equal(first["embedding"], second["embedding"])
        assert first["path"].tolist() == second["path"].tolist()


def test_all_processes_embed_with_the_same_checkpoint(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training may write a new one after the command has loaded its model."""

    def check(modules: object, job: dict[str, Any], nproc: int, folder: Path) -> None:
        loaded = load(job["model"], job["checkpoint"], "cpu")
        assert BulkClassifier(loaded, options).digest() == BulkClassifier(classifier, options).digest()
        checked.append(nproc)

    options, checked = BulkOptions(16, 1), list[int]()
    monkeypatch.setattr(ranks, "run_ranks", check)
    settings: Any = ([], None, False, "e.npz", "float32", "cpu", 16, "fp32", "torchvision", "")
    ranks.embed_on_ranks(ranks.EmbedJob(str(tmp_path / "run"), "latest", *settings), classifier, 2)
    assert checked == [2]


def test_chunks_of_other_settings_are_not_continued(chunked: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        chunked(stop=48)
    with pytest.raises(UserError, match="another value of --batch-size") as caught:
        chunked(batch=8)
    with pytest.raises(UserError, match="another value of --loader"):
        chunked(loader="torchvision")
    record = tmp_path / "e.npz.parts/record.json"
    earlier = json.loads(record.read_text())
    del earlier["--loader"]  # written by a version that always decoded with Pillow
    record.write_text(json.dumps(earlier))
    with pytest.raises(UserError, match="another value of --loader"):
        chunked()
    assert chunked(loader="torchvision")[0] == 32
    assert caught.value.field == "--out"
    assert str(tmp_path / "e.npz.parts") in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["predict", "gone.png", "--out", "p.csv"], "image"),
        (["predict", "images", "--out", "p.txt"], "--out"),
        (["predict", "images", "--out", "images"], "--out"),
        (["predict", "images", "--batch-size", "0"], "--batch-size"),
        (["predict", "images", "--root", "gone"], "--root"),
        (["predict", "images", "--root", "images"], "--root"),
        (["predict", "images", "--checkpoint", "best"], "run"),
        (["predict", "images/a/00.jpg", "--device", "gpu"], "device"),
        (["embed", "images", "--out", "e.csv"], "--out"),
        (["embed", "images", "--out", "e.npz", "--nproc", "0"], "--nproc"),
        (["embed", "images", "--out", "e.npz", "--nproc", "100000"], "--nproc"),
        (["embed", "images", "--out", "e.npz", "--nproc", "2", "--device", "cuda:0"], "--device"),
        (["embed", "images", "--out", "model.safetensors/e.npz"], "--out"),
    ],
)
def test_invalid_input_is_refused(arguments: list[str], field: str, place: Path) -> None:
    before = sorted(place.rglob("*"))
    command, *rest = arguments
    done = run_here(command, place, *rest, "--json", folder=place)
    assert (done.code, done.result["error"]["field"]) == (2, field), done.error
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("name", ["list.csv", "@list.csv"])
def test_a_list_is_not_overwritten(name: str, place: Path, files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"{files[0]}\n")
    done = run_here("predict", place, name, "--out", "list.csv", "--json", folder=tmp_path)
    assert (done.code, done.result["error"]["field"]) == (2, "--out"), done.error
    assert (tmp_path / "list.csv").read_text() == f"{files[0]}\n"
