"""`dl2pa predict`: classify images, few to the console or many to a file."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from dl2pa.commands import many_images
from dl2pa.commands.options import nonempty_path
from dl2pa.commands.output import note, say
from dl2pa.errors import EXIT_INTERRUPTED, UserError

if TYPE_CHECKING:
    from dl2pa.model.inference import Prediction
    from pipelines.datasets.named import NamedImages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    many_images.add_images(parser)
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes per image (default: 5)")
    parser.add_argument(
        "--out", type=nonempty_path, metavar="FILE", help="file to write: .csv, .jsonl or .parquet"
    )
    many_images.add_settings(parser)


def run(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise UserError("--top", args.top, "must be at least 1", "Give 1 or more.")
    many_images.check_settings(args)
    images = many_images.find(args)
    if args.out is not None:
        from dl2pa.bulk.prediction_files import SUFFIXES

        many_images.check_out(args.out, SUFFIXES, args.images)
        return _to_file(args, images)
    _check_few(args)
    return _to_console(args, images)


def _check_few(args: argparse.Namespace) -> None:
    """Refuse named files that are not images at once, if only files are named."""
    from pipelines.datasets.named import names_only_files
    from pipelines.images import check_image_file

    if names_only_files(map(str, args.images), args.list):
        for path in args.images:
            check_image_file(path)


def _to_console(args: argparse.Namespace, images: NamedImages) -> int:
    # Imports torch, so it comes after the checks.
    from dl2pa.bulk.prediction_files import row_of

    table = images.table()
    classifier = many_images.load_bulk(args, images, table)
    rows: list[dict[str, Any]] = []
    failures: dict[int, str] = {}
    for batch, tops in classifier.predictions(table, args.top):
        failures |= batch.failures
        for i, top in zip(batch.samples.tolist(), tops, strict=True):
            if args.json:
                rows.append(row_of(images.paths[i], top))
            else:
                print(f"{images.paths[i]}: {_text(top)}")  # noqa: T201
    many_images.note_other_files(images)
    skipped = many_images.report_failures(images, failures)
    if args.json:
        print(json.dumps({"predictions": rows, "skipped": skipped}))  # noqa: T201
    return many_images.exit_code(failures)


def _text(top: Sequence[Prediction]) -> str:
    return ", ".join(f"{guess.name} {100 * guess.probability:.1f} %" for guess in top)


def _to_file(args: argparse.Namespace, images: NamedImages) -> int:
    from dl2pa.bulk.prediction_files import prediction_file

    table = images.table()
    classifier = many_images.load_bulk(args, images, table)
    count = min(args.top, len(classifier.classifier.classes))
    failures: dict[int, str] = {}
    began, done = time.monotonic(), 0
    try:
        with (
            many_images.stopped_by_signals(),
            many_images.show_progress("predicting") as progress,
            prediction_file(args.out, count) as write,
            closing(classifier.predictions(table, count)) as predicted,
        ):
            for batch, tops in predicted:
                failures |= batch.failures
                write([images.paths[i] for i in batch.samples.tolist()], tops)
                done += len(batch.samples) + len(batch.failures)
                progress(done, len(images))
    except KeyboardInterrupt:
        note(f"dl2pa: interrupted after {done:,} of {len(images):,} images; {args.out} is not written")
        return EXIT_INTERRUPTED
    many_images.note_other_files(images)
    skipped = many_images.report_failures(images, failures)
    result = many_images.result_of(args.out, images, failures, time.monotonic() - began, done)
    say(result | ({"skipped": skipped} if args.json else {}), args.json, "predictions:")
    return many_images.exit_code(failures)
