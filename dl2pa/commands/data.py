"""`dl2pa data`: index a data set, or pack it into shards."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dl2pa.commands.options import (
    Parser,
    add_json,
    check_output_file,
    check_output_folder,
    nonempty_path,
    nonempty_text,
)
from dl2pa.commands.output import note, progress_bar, say
from dl2pa.errors import EXIT_INTERRUPTED, UserError
from dl2pa.osutil import usable_cores
from dl2pa.specs import is_remote
from pipelines.remote.address import RemotePath, place_of

if TYPE_CHECKING:
    from pipelines.datasets.index import Index
    from pipelines.datasets.lists import ListOptions
    from pipelines.datasets.parquet import ParquetOptions
    from pipelines.datasets.table import ImageTable

_MAX_SHOWN = 50
_MAX_RATIO = 8.0
"""Bytes of a compressed span per byte of an image from which on shuffled reading is much slower than shards."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=summary, description=summary)
        add_json(action, default=argparse.SUPPRESS)  # the default is that of `dl2pa data --json`
        action.add_argument("root", type=_place, metavar="ROOT", help="folder of the data set")
        action.add_argument(
            "--workers", type=int, metavar="N", help="number of processes (default: one per core)"
        )
        return action

    index = add("index", "List every image with its location, label and size; report damaged images.")
    index.add_argument("--out", type=_place, metavar="FILE", help="index file (default: ROOT/dl2pa.index)")
    index.add_argument(
        "--decode", action="store_true", help="decode every image: also finds damage inside its data"
    )
    _add_sources(index)
    pack = add("pack", "Copy an image folder into tar shards in WebDataset format, with an index.")
    pack.add_argument(
        "--index",
        type=nonempty_path,
        metavar="FILE",
        help="index of ROOT (default: ROOT/dl2pa.index, if any)",
    )
    pack.add_argument("out", type=nonempty_path, metavar="OUT", help="folder for the shards, new or empty")
    pack.add_argument(
        "--short-side",
        type=int,
        metavar="PIXELS",
        help="resize images whose shorter side is larger to this shorter side",
    )
    pack.add_argument("--quality", type=int, default=90, help="JPEG quality of resized images (default: 90)")
    pack.add_argument(
        "--shard-size",
        type=nonempty_text,
        default="1GiB",
        metavar="SIZE",
        help="approximate shard size (default: 1GiB)",
    )


def _add_sources(index: argparse.ArgumentParser) -> None:
    lists = index.add_argument_group("lists of images")
    lists.add_argument(
        "--list",
        type=nonempty_path,
        metavar="FILE",
        help="training images: lines of a path relative to ROOT and a label, or CSV",
    )
    lists.add_argument("--val-list", type=nonempty_path, metavar="FILE", help="validation images")
    lists.add_argument(
        "--classes", type=nonempty_path, metavar="FILE", help="class names in label order; also for Parquet"
    )
    lists.add_argument(
        "--columns", type=nonempty_text, metavar="PATHS,LABELS", help="names of the columns of a CSV file"
    )
    lists.add_argument("--skip-missing", action="store_true", help="skip listed files that do not exist")
    parquet = index.add_argument_group("Parquet files")
    parquet.add_argument(
        "--image-column", type=nonempty_text, metavar="NAME", help="column of the image bytes"
    )
    parquet.add_argument(
        "--label-column", type=nonempty_text, metavar="NAME", help="column of the labels (default: label)"
    )


def _place(text: str) -> Path:
    """Argument type: a path, or an address in object storage."""
    if not is_remote(text):
        return nonempty_path(text)
    try:
        return place_of("ROOT", text)
    except UserError as error:
        raise argparse.ArgumentTypeError(
            f"{error.value} {error.message}; {error.remedy}".rstrip(".")
        ) from None


def _refuse_remote(field: str, path: Path, when: str) -> None:
    if isinstance(path, RemotePath):
        remedy = "Write it to a folder of this machine, and upload the folder."
        raise UserError(field, str(path), f"is in object storage, which is not possible {when}", remedy)


def run(args: argparse.Namespace) -> int:
    workers = args.workers if args.workers is not None else usable_cores()
    if workers < 1:
        raise UserError("--workers", workers, "must be at least 1", "Set a positive number of processes.")
    try:
        return _index(args, workers) if args.action == "index" else _pack(args, workers)
    except KeyboardInterrupt:
        note("dl2pa: interrupted; run the same command again to continue")
        return EXIT_INTERRUPTED


def _index(args: argparse.Namespace, workers: int) -> int:
    from pipelines.datasets.build_index import build_index, default_out
    from pipelines.datasets.shards import check_verified

    root: Path = args.root
    out: Path = args.out or default_out(root)
    if args.out is not None and not isinstance(out, RemotePath):
        check_output_file("--out", out)
    start = time.monotonic()
    options = _source_options(args)
    if isinstance(root, RemotePath):
        if options is not None:
            message = "is in object storage, where only tar shards are indexed"
            raise UserError("ROOT", str(root), message, "Leave out the options of lists and Parquet files.")
        from pipelines.remote.index import build_remote_index

        build = partial(build_remote_index, root, out, workers, decode=args.decode)
    else:
        check_verified(root, "ROOT")
        _refuse_remote("--out", out, "with a ROOT on this machine")
        build = partial(build_index, root, out, workers, decode=args.decode, options=options)
    with progress_bar("indexing") as progress:
        index = build(progress)
    result = {
        "index": str(out),
        **_describe(index, index, root),
        "seconds": round(time.monotonic() - start, 2),
    }
    _print(result, args.json, f"Indexed {root}:")
    return 0


def _source_options(args: argparse.Namespace) -> ListOptions | ParquetOptions | None:
    """Options of lists or Parquet files; None without any.

    Raises:
        UserError: an option without the one that it belongs to.
    """
    from pipelines.datasets.lists import ListOptions
    from pipelines.datasets.parquet import ParquetOptions

    columns = _columns(args.columns)
    if args.list is None:
        needs_list = {"--val-list": args.val_list, "--columns": columns, "--skip-missing": args.skip_missing}
        option = next((option for option, value in needs_list.items() if value), None)
        if option is not None:
            message = "is an option of lists, but --list is not given"
            raise UserError(option, str(needs_list[option]), message, "Add --list FILE, or leave it out.")
        parquet = ParquetOptions(args.image_column, args.label_column, args.classes)
        return None if parquet == ParquetOptions() else parquet
    option = "--image-column" if args.image_column else "--label-column"
    if value := args.image_column or args.label_column:
        raise UserError(option, value, "is an option of Parquet files", "Leave it out with --list.")
    return ListOptions(args.list, args.val_list, args.classes, columns, args.skip_missing)


def _columns(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    paths, comma, labels = (part.strip() for part in text.partition(","))
    if not (paths and comma and labels) or "," in labels:
        remedy = "Write for example --columns image,label."
        raise UserError("--columns", text, "is not two names separated by a comma", remedy)
    return paths, labels


def _pack(args: argparse.Namespace, workers: int) -> int:
    from pipelines.datasets.build_index import list_source
    from pipelines.datasets.pack import PackOptions, pack

    if args.short_side is not None and args.short_side < 1:
        raise UserError("--short-side", args.short_side, "must be at least 1", "Set for example 256 pixels.")
    if not 1 <= args.quality <= 100:
        raise UserError("--quality", args.quality, "is not a JPEG quality", "Set a value from 1 to 100.")
    _refuse_remote("ROOT", args.root, "with `data pack`")
    options = PackOptions(args.short_side, args.quality, _bytes("--shard-size", args.shard_size))
    check_output_folder("OUT", args.out)
    root: Path = args.root
    start = time.monotonic()
    source = list_source(root, args.index)
    with progress_bar("packing") as progress:
        packed = pack(source, args.out, options, workers, progress)
    result: dict[str, Any] = {
        "out": str(args.out),
        "shards": packed.shards,
        "gib_before": packed.bytes_in / 2**30,
        "gib_after": packed.bytes_out / 2**30,
        **_describe(packed.index, source, args.out),
        "not_resampled": packed.not_resized,
        "seconds": round(time.monotonic() - start, 2),
    }
    _print(result, args.json, f"Packed {root} and verified the shards; train with data.root={args.out}:")
    return 0


def _describe(index: Index, source: Index, root: Path) -> dict[str, Any]:
    """Counts, problems and skipped files of an index.

    Args:
        source: the index of the files that were listed.
        root: the folder that the paths of problems are relative to.
    """
    from pipelines.datasets.build_index import problems_of

    problems = list(problems_of(index, root))
    counts = Counter(kind for problem in problems for kind in problem["kinds"].split(", "))
    tables = {name: split.table for name, split in index.splits.items()}
    return {
        "images": {name: len(table) for name, table in tables.items()},
        "classes": len(index.classes),
        "fingerprint": {name: table.fingerprint for name, table in tables.items()},
        "problem_counts": dict(counts),
        "skipped": {name: split.table.skipped.as_dict() for name, split in source.splits.items()},
        "warnings": _warnings(index, source),
        "problems": problems,
    }


def _warnings(index: Index, source: Index) -> list[str]:
    """Classes without images and skipped files, one text each."""
    from pipelines.datasets.classes import empty_classes

    texts: list[str] = []
    for name, split in index.splits.items():
        empty = empty_classes(split.table.labels, split.table.classes)
        texts += [f"{name}: {empty}"] if empty else []
        skipped = source.splits[name].table.skipped
        texts += [f"{name}: skipped {skipped}"] if skipped.total else []
        texts += _slow_to_shuffle(name, split.table)
    return texts


def _slow_to_shuffle(name: str, table: ImageTable) -> list[str]:
    """Warning about Parquet files of which every image needs many times its own bytes."""
    spans = None if table.members is None else table.members.spans
    ratio = 0.0 if spans is None else float(spans.sizes.sum()) / max(1, int(table.lengths.sum()))
    if ratio <= _MAX_RATIO:
        return []
    remedy = "`dl2pa data pack` writes shards, of which each image is read alone"
    return [f"{name}: shuffled reading takes {ratio:.0f} times the bytes of the images; {remedy}"]


def _print(result: dict[str, Any], as_json: bool, title: str) -> None:
    if as_json:
        say(result, True, "")
        return
    hidden = ("problems", "skipped", "warnings")
    rows = {k: _inline(v) if isinstance(v, dict) else v for k, v in result.items() if k not in hidden}
    say({k: v if v != [] and v != "" else "none" for k, v in rows.items()}, False, title)
    for warning in result["warnings"]:
        note(f"  {warning}")
    for problem in result["problems"][:_MAX_SHOWN]:
        note(f"  {problem['path']}: {problem['kinds']} ({problem['reason']})")
    if len(result["problems"]) > _MAX_SHOWN:
        note(f"  … and {len(result['problems']) - _MAX_SHOWN:,} more; --json lists all")


def _inline(values: dict[str, Any]) -> str:
    texts = {key: f"{value:,}" if isinstance(value, int) else str(value) for key, value in values.items()}
    return ", ".join(f"{key} {value}" for key, value in texts.items())


def _bytes(option: str, text: str) -> int:
    """Number of bytes of a size such as ``1GiB``, ``500MB`` or ``1000``."""
    number = text.rstrip("BbiIkKmMgG")
    unit = text[len(number) :].upper().removesuffix("B")
    try:
        value = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        value = 0
    if value < 1:
        raise UserError(option, text, "is not a valid size", "Set for example 1GiB or 500MB.")
    return value
