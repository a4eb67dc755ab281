"""`dl2pa prototypes`: construct, certify, write and plot prototypes. The option names of the authors' code work too."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dl2pa.commands.options import add_renamed, check_output_file, nonempty_path
from dl2pa.commands.output import note, say, short, table
from dl2pa.constructions import (
    CONSTRUCTIONS,
    check_defined,
    check_plot_file,
    check_prototype_file,
    check_written_file,
)
from dl2pa.errors import UserError

if TYPE_CHECKING:
    from dl2pa.geometry import Prototypes

_PROGRESS_S = 10.0
_OPTIONS = {"num_classes": "--num-classes", "dim": "--dim", "method.prototypes": "--construction"}
"""Fields of an undefined construction to the options that set them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-classes", "--num_centroids", type=int, required=True, metavar="C", help="number of prototypes"
    )
    parser.add_argument("--dim", "--space_dim", type=int, required=True, metavar="D", help="dimension")
    parser.add_argument(
        "--construction", default="auto", help="construction (default: the best one known for C and D)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument(
        "--out", type=nonempty_path, metavar="FILE", help=".safetensors or .npy (default: not written)"
    )
    parser.add_argument(
        "--plot",
        type=nonempty_path,
        metavar="FILE",
        help="plot of the pairwise cosines, for D <= 3 also of the sphere: .png, .pdf or .svg",
    )
    parser.add_argument(
        "--compare-with",
        type=nonempty_path,
        metavar="FILE",
        help="also certify a prototype file: written by dl2pa, .npy, or .pth of the authors' code",
    )
    add_renamed(parser, "--beside", "--compare-with")
    parser.add_argument("--batch_size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--num_epoch", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    _check(args)

    # These import torch, so they come after the checks.
    from dl2pa.geometry import build_prototypes, save_prototypes
    from dl2pa.geometry.plot import plot_prototypes

    other = None if args.compare_with is None else _load(args)
    with _Progress() as progress, _naming_options():
        prototypes = build_prototypes(args.num_classes, args.dim, args.construction, args.seed, progress)
    if args.out is not None:
        save_prototypes(prototypes, args.out)
    if args.plot is not None:
        plot_prototypes(prototypes, args.plot)
    files = {"file": args.out and str(args.out), "plot": args.plot and str(args.plot)}
    result: dict[str, Any] = {**prototypes.certificate.as_dict(), **files}
    if other is None:
        say(result, args.json, "prototypes:")
        return 0
    compared = {**other.certificate.as_dict(), "file": str(args.compare_with)}
    if args.json:
        say({**result, "beside": compared}, True, "")
    else:
        rows = [[key, short(value), short(compared.get(key, ""))] for key, value in result.items()]
        table([["", "constructed", "compared"], *rows])
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse invalid options before the construction, which can take minutes."""
    if args.construction not in CONSTRUCTIONS:
        remedy = f"Choose one of {', '.join(CONSTRUCTIONS)}; give a file with --compare-with."
        raise UserError("--construction", args.construction, "is not a construction", remedy)
    if args.seed < 0:
        raise UserError("--seed", args.seed, "must not be negative", "Give 0 or more.")
    with _naming_options():
        check_defined(args.construction, args.num_classes, args.dim)
    if args.out is not None:
        check_written_file(args.out, "--out")
        check_output_file("--out", args.out)
    if args.plot is not None:
        check_plot_file(args.plot)
        check_output_file("--plot", args.plot)
    if args.compare_with is not None:
        with _naming("--compare-with", args.compare_with):
            check_prototype_file(args.compare_with, args.num_classes, args.dim)
    for flag in ("batch_size", "num_epoch"):
        if getattr(args, flag) is not None:
            note(f"--{flag} is ignored: the constructions use neither batches nor epochs")


def _load(args: argparse.Namespace) -> Prototypes:
    from dl2pa.geometry import load_prototypes

    with _naming("--compare-with", args.compare_with):
        return load_prototypes(args.compare_with, args.num_classes, args.dim)


@contextmanager
def _naming(option: str, path: Path) -> Generator[None]:
    """Name the option in errors of its file."""
    try:
        yield
    except UserError as error:
        raise UserError(option, str(path), error.message, error.remedy) from None


@contextmanager
def _naming_options() -> Generator[None]:
    """Name the options in errors of a construction."""
    try:
        yield
    except UserError as error:
        field = _OPTIONS.get(error.field, error.field)
        raise UserError(field, error.value, error.message, error.remedy) from None


class _Progress:
    """Progress on standard error: a bar on a terminal, otherwise a line every 10 s."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._last_line = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total, unit="step", leave=False, file=sys.stderr)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._last_line >= _PROGRESS_S:
            self._last_line = time.monotonic()
            note(f"constructing prototypes: step {done:,} of {total:,}")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
