"""`dl2pa embed`: write the embeddings of many images to a file; the same command continues a stopped one."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from dl2pa.commands import many_images
from dl2pa.commands.options import nonempty_path, resolve_nproc_option
from dl2pa.commands.output import note, say
from dl2pa.errors import EXIT_STOPPED, UserError
from dl2pa.process import torchrun_ranks

if TYPE_CHECKING:
    from dl2pa.bulk.classifier import BulkClassifier
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
    parser.add_argument(
        "--nproc", metavar="N", help="processes on this machine, or auto: one per GPU (default: 1)"
    )


def run(args: argparse.Namespace) -> int:
    from dl2pa.bulk.embeddings import SUFFIXES

    many_images.check_settings(args)
    nproc = _nproc(args)
    images = many_images.find(args)
    many_images.check_out(args.out, SUFFIXES, args.images)
    try:
        with many_images.stopped_by_signals():
            return _embed(args, images, nproc)
    except KeyboardInterrupt:
        note("stopped; the same command continues")
        return EXIT_STOPPED


def _nproc(args: argparse.Namespace) -> int:
    """Number of processes.

    Raises:
        UserError: neither a positive number nor `auto`; several processes on one named GPU, or under torchrun.
    """
    if args.nproc is None:
        return 1
    device = str(args.device)
    nproc = resolve_nproc_option(args.nproc, device)
    if nproc > 1 and device not in ("auto", "cpu", "cuda"):
        raise UserError("--device", device, "is one device for several processes", "Give auto, cpu or cuda.")
    if torchrun_ranks() is not None:
        message = "starts this command several times"
        raise UserError("environment", "torchrun", message, "Run it once, with --nproc N.")
    return nproc


def _embed(args: argparse.Namespace, images: NamedImages, nproc: int) -> int:
    from dl2pa.bulk.embeddings import Columns, EmbeddingFile

    table = images.table()
    classifier = many_images.load_bulk(args, images, table)  # imports torch, so it comes after the checks
    classes, labels = images.classes(classifier.classifier.classes)
    columns = Columns(images.paths, classes, labels) if any(classes) else Columns(images.paths, None, None)
    began = time.monotonic()
    first: int | None = None
    with many_images.show_progress("embedding") as progress:

        def update(done: int, total: int) -> None:
            nonlocal first
            first = done if first is None else first
            progress(done, total)

        file = EmbeddingFile(args.out, args.dtype)
        elsewhere = (
            None if nproc == 1 else lambda: _embed_on_ranks(args, classifier, table.fingerprint, nproc)
        )
        failures = file.compute(classifier, table, columns, update, elsewhere)
    many_images.note_other_files(images)
    skipped = many_images.report_failures(images, failures)
    computed = len(images) - (first or 0)
    result = many_images.result_of(args.out, images, failures, time.monotonic() - began, computed)
    result |= {"dim": classifier.classifier.class_vectors.shape[1], "dtype": args.dtype}
    say(result | ({"skipped": skipped} if args.json else {}), args.json, "embeddings:")
    return many_images.exit_code(failures)


def _embed_on_ranks(args: argparse.Namespace, bulk: BulkClassifier, fingerprint: str, nproc: int) -> None:
    from dl2pa.bulk.ranks import EmbedJob, embed_on_ranks
    from dl2pa.training.distributed import choose_device

    choose_device(args.device, nproc - 1)
    job = EmbedJob(
        model=str(args.model),
        checkpoint=args.checkpoint,
        images=[str(image) for image in args.images],
        root=None if args.root is None else str(args.root),
        is_list=args.list,
        out=str(args.out),
        dtype=args.dtype,
        device=args.device,
        batch=bulk.options.batch,
        precision=bulk.precision,
        loader=bulk.options.loader,
        fingerprint=fingerprint,
    )
    embed_on_ranks(job, bulk.classifier, nproc)
