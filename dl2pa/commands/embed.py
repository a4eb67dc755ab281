"""`dl2pa embed`: write the embeddings of many images to a file; the same command continues a stopped one."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from dl2pa.commands import many_images
from dl2pa.commands.options import nonempty_path
from dl2pa.commands.output import note, say
from dl2pa.errors import EXIT_STOPPED

if TYPE_CHECKING:
    from pipelines.datasets.named import NamedImages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    many_images.add_images(parser)
    parser.add_argument(
        "--out", type=nonempty_path, required=True, metavar="FILE", help="file to write: .npz or .parquet"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="stored numbers (default: float32)"
    )
    many_images.add_settings(parser)


def run(args: argparse.Namespace) -> int:
    from dl2pa.bulk.embeddings import SUFFIXES

    many_images.check_settings(args)
    images = many_images.find(args)
    many_images.check_out(args.out, SUFFIXES)
    try:
        with many_images.stopped_by_signals():
            return _embed(args, images)
    except KeyboardInterrupt:
        note("stopped; the same command continues")
        return EXIT_STOPPED


def _embed(args: argparse.Namespace, images: NamedImages) -> int:
    from dl2pa.bulk.embeddings import Columns, EmbeddingFile

    classifier = many_images.load_bulk(args)  # imports torch, so it comes after the checks
    classes, labels = images.classes(classifier.classifier.classes)
    columns = Columns(images.paths, classes, labels) if any(classes) else Columns(images.paths, None, None)
    began = time.monotonic()
    first: int | None = None
    with many_images.show_progress("embedding") as progress:

        def update(done: int, total: int) -> None:
            nonlocal first
            first = done if first is None else first
            progress(done, total)

        failures = EmbeddingFile(args.out, args.dtype).compute(classifier, images.table(), columns, update)
    many_images.note_other_files(images)
    skipped = many_images.report_failures(images, failures)
    computed = len(images) - (first or 0)
    result = many_images.result_of(args.out, images, failures, time.monotonic() - began, computed)
    result |= {"dim": classifier.classifier.class_vectors.shape[1], "dtype": args.dtype}
    say(result | ({"skipped": skipped} if args.json else {}), args.json, "embeddings:")
    return many_images.exit_code(failures)
