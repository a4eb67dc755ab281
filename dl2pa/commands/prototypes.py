"""`dl2pa prototypes`: place, certify, write and draw prototypes; the authors' flag names work too."""

from __future__ import annotations

import argparse
import sys
import time
from types import TracebackType
from typing import Any

from dl2pa.commands.output import note, say, short, table
from dl2pa.errors import UserError

_SECONDS_BETWEEN_LINES = 10.0


def run(args: argparse.Namespace) -> int:
    from dl2pa.geometry import CONSTRUCTIONS, build_prototypes, load_prototypes, save_prototypes
    from dl2pa.geometry.files import check_form
    from dl2pa.geometry.plot import check_picture, plot_prototypes

    # A name that cannot be written is refused now, not after a minute's search.
    if args.out is not None:
        check_form(args.out)
    if args.plot is not None:
        check_picture(args.plot)
    for flag in ("batch_size", "num_epoch"):
        if getattr(args, flag) is not None:
            note(f"--{flag} is accepted and ignored: our constructions need neither batches nor epochs")
    if args.construction not in CONSTRUCTIONS:
        remedy = f"Choose one of {', '.join(CONSTRUCTIONS)}; a file is scored by --beside."
        raise UserError("--construction", args.construction, "no such construction", remedy)
    other = None if args.beside is None else load_prototypes(args.beside, args.num_classes, args.dim)
    with _Progress() as progress:
        prototypes = build_prototypes(args.num_classes, args.dim, args.construction, args.seed, progress)
    if args.out is not None:
        save_prototypes(prototypes, args.out)
    if args.plot is not None:
        plot_prototypes(prototypes, args.plot)
    written = {
        "file": None if args.out is None else str(args.out),
        "plot": None if args.plot is None else str(args.plot),
    }
    result: dict[str, Any] = {**prototypes.certificate.as_dict(), **written}
    if other is None:
        say(result, args.json, "prototypes:")
    elif args.json:
        say({**result, "beside": {**other.certificate.as_dict(), "file": str(args.beside)}}, True, "")
    else:
        theirs = {**other.certificate.as_dict(), "file": args.beside}
        rows = [[key, short(value), short(theirs.get(key, ""))] for key, value in result.items()]
        table([["", "ours", "beside"], *rows])
    return 0


class _Progress:
    """Steps done of all, on standard error: a bar on a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._spoke = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total, unit="step", leave=False, file=sys.stderr)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._spoke >= _SECONDS_BETWEEN_LINES:
            self._spoke = time.monotonic()
            note(f"placing prototypes: step {done:,} of {total:,}")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
