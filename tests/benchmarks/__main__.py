"""Command line of the benchmarks of internals."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from dl2pa.bench import PRECISIONS
from dl2pa.commands.bench import COMPILE, Measured, add_steps, measure, numbers, one_model, words
from dl2pa.commands.options import Parser, add_json
from dl2pa.errors import EXIT_USER_ERROR, UserError
from dl2pa.osutil import usable_cores
from dl2pa.specs import BACKBONES, SMALL_BACKBONE


def _precision(args: argparse.Namespace) -> str | None:
    return args.precision and words("--precision", args.precision, PRECISIONS, limit=1)[0]


def _default_precision(world: Any) -> str:
    return "bf16" if world.device.type == "cuda" else "fp32"


def _concurrent(args: argparse.Namespace) -> Callable[[Any], Measured]:
    model = one_model(args, [name for name, spec in BACKBONES.items() if spec.small])
    counts = numbers("--processes", args.processes, 1)
    compile = COMPILE[words("--compile", args.compile, tuple(COMPILE), limit=1)[0]]
    precision = _precision(args)

    def measurement(world: Any) -> Measured:
        from benchmarks.concurrent import bench_concurrent

        steps = args.batch_size, args.steps, args.rounds
        return *bench_concurrent(model, counts, *steps, precision or _default_precision(world), compile), {}

    return measurement


def _checkpoint(args: argparse.Namespace) -> Callable[[Any], Measured]:
    models, precision = words("--models", args.models, tuple(BACKBONES)), _precision(args)

    def measurement(world: Any) -> Measured:
        from benchmarks.checkpoint import bench_checkpoint

        steps = args.batch_size, args.steps, args.rounds
        return *bench_checkpoint(models, *steps, precision or _default_precision(world), world), {}

    return measurement


def _index(args: argparse.Namespace) -> Callable[[Any], Measured]:
    entries = numbers("--entries", args.entries, 64)

    def measurement(_world: Any) -> Measured:
        from benchmarks.index import bench_index

        return {}, bench_index(entries, args.rounds), {}

    return measurement


def _tracking(args: argparse.Namespace) -> Callable[[Any], Measured]:
    def measurement(world: Any) -> Measured:
        from benchmarks.tracking import bench_tracking

        return *bench_tracking(args.points, args.runs, args.rounds, world), {}

    return measurement


def build_parser() -> argparse.ArgumentParser:
    """Build a parser with one sub-command per benchmark."""
    parser = Parser(prog="python -m benchmarks", description="Measure internals of dl2pa.")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME", parser_class=Parser)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        benchmark = names.add_parser(name, help=text, description=text)
        add_json(benchmark)
        benchmark.add_argument("--rounds", type=int, default=5, metavar="N", help="number of rounds (5)")
        return benchmark

    concurrent = add("concurrent", "Concurrent runs on one device, compared with a single run.")
    add_steps(concurrent, SMALL_BACKBONE)
    concurrent.add_argument("--processes", default="1,2,4", metavar="LIST", help="numbers of runs (1,2,4)")
    concurrent.add_argument("--compile", default="off", metavar="MODE", help="on, off or graphs (off)")
    checkpoint = add("checkpoint", "Steps with and without a concurrent checkpoint.")
    add_steps(checkpoint, SMALL_BACKBONE)
    for benchmark in (concurrent, checkpoint):
        benchmark.add_argument("--precision", metavar="P", help="fp32, bf16 or fp16 (GPU: bf16, CPU: fp32)")
    index = add("index", "Opening an index of millions of images.")
    index.add_argument("--entries", default="1281167", metavar="LIST", help="numbers of images (1281167)")
    tracking = add("tracking", "Step time and throughput of tracking with a real MLflow server.")
    tracking.add_argument(
        "--points", type=int, default=100_000, metavar="N", help="metric points per run (100000)"
    )
    tracking.add_argument("--runs", type=int, default=3, metavar="N", help="concurrent runs (3)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a benchmark and return the exit code."""
    try:
        args = build_parser().parse_args(arguments)
        # Leave a core to the tracking server on the same machine.
        threads = max(1, usable_cores() - 1) if args.name == "tracking" else None
        benchmarks = {
            "concurrent": _concurrent,
            "checkpoint": _checkpoint,
            "index": _index,
            "tracking": _tracking,
        }
        return measure(args, benchmarks[args.name], threads)
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
