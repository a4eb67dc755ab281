"""Options, checks and reports of the commands that read many images with a trained model: `predict` and `embed`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from dl2pa.commands.options import add_checkpoint, check_output_file, nonempty_path, nonempty_text
from dl2pa.commands.output import note, progress_bar
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, UserError
from dl2pa.osutil import usable_cores

if TYPE_CHECKING:
    from dl2pa.bulk.classifier import BulkClassifier
    from pipelines.datasets.named import NamedImages
    from pipelines.datasets.table import ImageTable

_LOG_EVERY_S = 10.0
_COMMON = (".jpg", ".jpeg", ".png")
_LARGE = 1 << 20


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add the model and the images."""
    add = parser.add_argument
    add("model", type=nonempty_path, help="run directory, export or model.safetensors")
    add(
        "images",
        type=nonempty_path,
        nargs="+",
        metavar="IMAGE",
        help="image, folder, 'pattern', or list of images: @FILE, .txt, .csv or .tsv",
    )
    add("--list", action="store_true", help="every IMAGE is a list, whatever its name")
    add(
        "--root",
        type=nonempty_path,
        metavar="DIR",
        help="folder that the paths in lists are relative to (default: the current one)",
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint and the settings of the computation."""
    add_checkpoint(parser)
    add = parser.add_argument
    add("--device", type=nonempty_text, default="auto", metavar="D", help="auto, cpu, cuda or cuda:N")
    add("--batch-size", type=int, metavar="N", help="images per batch (default: 64)")
    add(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="precision of the network (default: fp32)",
    )
    add(
        "--loader",
        choices=("dali", "torchvision"),
        help="decoder of the images (default: dali for small JPEG and PNG files with --out, otherwise torchvision)",
    )


def check_settings(args: argparse.Namespace) -> None:
    """Check model and settings without importing torch.

    Raises:
        UserError: the first invalid one.
    """
    from dl2pa.rundir import find_model_file
    from pipelines.datasets.named import names_a_list

    if args.batch_size is not None and args.batch_size < 1:
        raise UserError("--batch-size", args.batch_size, "must be at least 1", "Give 1 or more.")
    if args.root is not None and not args.root.is_dir():
        raise UserError("--root", str(args.root), "is not a folder", "Give the folder of the listed images.")
    if args.root is not None and not names_a_list(map(str, args.images), args.list):
        message, remedy = "has no effect without a list of images", "Leave it out, or add --list."
        raise UserError("--root", str(args.root), message, remedy)
    if args.loader == "dali" and not _has_dali():
        raise UserError("--loader", "dali", "DALI is not installed", "Give --loader torchvision.")
    if args.checkpoint == "final":
        find_model_file(args.model)
    else:
        from dl2pa.recorded_run import check_weights, load_run_config

        load_run_config(args.model, ())
        check_weights(args.model, args.checkpoint)


def check_out(out: Path, suffixes: Sequence[str], inputs: Sequence[Path]) -> None:
    """Check the name and the place of the file to write.

    Args:
        inputs: images, folders and lists as they were named.

    Raises:
        UserError: an unknown suffix, a place that cannot be written, or a file that is read (`--out`).
    """
    if out.suffix.lower() not in suffixes:
        *others, last = suffixes
        remedy = f"Give a file name that ends in {', '.join(others)} or {last}."
        raise UserError("--out", str(out), "has an unknown format", remedy)
    check_output_file("--out", out)
    read = (Path(str(path).removeprefix("@")) for path in inputs)
    if out.exists() and any(path.is_file() and path.samefile(out) for path in read):
        raise UserError("--out", str(out), "is also an input", "Give another file.")


def find(args: argparse.Namespace) -> NamedImages:
    """The images of the arguments.

    Raises:
        UserError: see ``find_images``.
    """
    from pipelines.datasets.named import find_images

    return find_images(map(str, args.images), args.root, args.list)


def load_bulk(args: argparse.Namespace, images: NamedImages, table: ImageTable) -> BulkClassifier:
    """Load the model on its device.

    DALI is the default only for small JPEG and PNG files, because it holds whole images of several steps in memory.

    Args:
        images, table: the images of the arguments.
    """
    from dl2pa.api import load
    from dl2pa.bulk.classifier import BulkClassifier
    from dl2pa.model.inference import BATCH
    from pipelines.bulk import BulkOptions

    classifier = load(args.model, args.checkpoint, args.device)
    for_dali = args.out is not None and _has_dali() and are_small(images, table)
    loader = args.loader or ("dali" if for_dali else "torchvision")
    options = BulkOptions(args.batch_size or BATCH, usable_cores(), loader)
    return BulkClassifier(classifier, options, args.precision)


def are_small(images: NamedImages, table: ImageTable) -> bool:
    """Whether all files are JPEG or PNG files, by their suffixes, of at most 1 MiB."""
    is_large = int(table.lengths.max(initial=0)) > _LARGE
    return not is_large and all(path.lower().endswith(_COMMON) for path in images.paths)


def _has_dali() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


@contextmanager
def show_progress(title: str) -> Generator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal, otherwise a line every 10 seconds; yields the function that updates it."""
    began = last = time.monotonic()
    start: int | None = None

    with progress_bar(title) as bar:

        def update(done: int, total: int) -> None:
            nonlocal last, start
            start = done if start is None else start
            bar(done, total)
            now = time.monotonic()
            if now - last > _LOG_EVERY_S and not sys.stderr.isatty():
                last = now
                note(f"{done:,} of {total:,} images, {(done - start) / (now - began):,.0f} images/s")

        yield update


@contextmanager
def stopped_by_signals() -> Generator[None]:
    """Context in which SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def report_failures(images: NamedImages, failures: Mapping[int, str]) -> list[dict[str, Any]]:
    """List the unreadable images on standard error with their number; return the list for `--json`."""
    rows = [{"image": images.paths[i], "reason": failures[i]} for i in sorted(failures)]
    for row in rows:
        note(f"skipped {row['image']}: {row['reason']}")
    if rows:
        note(f"{len(rows):,} of {len(images):,} images could not be read and were skipped")
    return rows


def note_other_files(images: NamedImages) -> None:
    """State how many files of the folders are not images."""
    if images.skipped.total:
        note(f"other files: {images.skipped}")


def exit_code(failures: Mapping[int, str]) -> int:
    """1 if an image could not be read, otherwise 0."""
    return EXIT_FAILURE if failures else EXIT_DONE


def result_of(
    out: Path, images: NamedImages, failures: Mapping[int, str], seconds: float, computed: int
) -> dict[str, Any]:
    """Summary of what was written.

    Args:
        computed: images that this command has read, without those of a stopped one.
    """
    return {
        "out": str(out),
        "images": len(images) - len(failures),
        "failed": len(failures),
        "seconds": round(seconds, 2),
        "images_per_second": round(computed / seconds, 1),
        "size": os.path.getsize(out),  # noqa: PTH202  # shorter than a Path
    }
