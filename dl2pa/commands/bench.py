"""`dl2pa bench NAME`: measure a part of the program and print the result with hardware and versions."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from dl2pa.bench import LOADERS, PACKED, PRECISIONS, TRAIN_LOADERS, check_folder, check_loader
from dl2pa.commands.options import add_json, nonempty_path
from dl2pa.commands.output import say
from dl2pa.errors import UserError
from dl2pa.specs import BACKBONES, DEFAULT_BACKBONE, SMALL_BACKBONE

log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]
Measured = tuple[dict[str, float], Rows, dict[str, Rows]]
"""Result of a benchmark: ratios by name, a table as rows, and further tables by name."""
Benchmark = Callable[[argparse.Namespace], Callable[[Any], Measured]]
"""Checks the options, without torch, and returns the measurement, which takes the ``World``."""
COMPILE: dict[str, Any] = {"off": False, "on": True, "graphs": "graphs"}
"""Maps a value of `--compile` to the value of `train.compile`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmarks of `dl2pa bench` and their options."""
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME", parser_class=type(parser))
    for name, (text, add, _) in BENCHMARKS.items():
        benchmark = names.add_parser(name, help=text, description=text)
        add_json(benchmark, default=argparse.SUPPRESS)  # keep the value of `dl2pa bench --json NAME`
        benchmark.add_argument("--rounds", type=int, default=5, metavar="N", help="number of repetitions (5)")
        add(benchmark)


def run(args: argparse.Namespace) -> int:
    return measure(args, BENCHMARKS[args.name][2])


def measure(
    args: argparse.Namespace,
    benchmark: Benchmark,
    threads: int | None = None,
) -> int:
    """Run one benchmark and print its result.

    Args:
        threads: CPU threads of this process; default: all cores.

    Raises:
        UserError: an option is invalid.
    """
    for name, value in vars(args).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UserError(f"--{name.replace('_', '-')}", value, "must be positive", "Give 1 or more.")
    measurement = benchmark(args)

    from dl2pa.config import Config
    from dl2pa.config.schema import LaunchConfig
    from dl2pa.training.distributed import join_world
    from dl2pa.training.environment import describe_environment

    world = join_world(Config(launch=LaunchConfig(threads=threads)))
    environment = describe_environment(world)
    ratios, rows, groups = measurement(world)
    hardware, versions = _machine(args, environment)
    if args.json:
        result = {"bench": args.name, "ratios": ratios, "rows": rows, **groups, "n": args.rounds}
        say({**result, "hardware": hardware, "versions": versions}, True, "")
        return 0
    say({**hardware, **versions, "n": args.rounds}, False, f"bench {args.name}:")
    for row in [*rows, *(row for group in groups.values() for row in group), *([ratios] if ratios else [])]:
        say(row, False, "")
    return 0


def add_steps(parser: argparse.ArgumentParser, model: str) -> None:
    """Add the options of a benchmark that measures training steps."""
    parser.add_argument("--models", default=model, metavar="LIST", help=f"backbones ({model})")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="global batch size (128)")
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="training steps per repetition (20)"
    )


def one_model(args: argparse.Namespace, known: Sequence[str] = tuple(BACKBONES)) -> str:
    """Return the backbone of `--models` for benchmarks that accept only one."""
    return words("--models", args.models, known, limit=1)[0]


def words(option: str, text: str, known: Sequence[str], limit: int | None = None) -> list[str]:
    """Return the distinct comma-separated words of an option.

    Raises:
        UserError: an unknown word, or more than `limit` words.
    """
    values = text.split(",")
    if limit is not None and len(values) > limit:
        raise UserError(option, text, f"has more than {limit} value", f"Give {limit}.")
    for word in values:
        if word not in known:
            raise UserError(option, word, "is unknown", f"Use one or more of {','.join(known)}.")
    return list(dict.fromkeys(values))


def numbers(option: str, text: str, minimum: int) -> list[int]:
    """Return the comma-separated integers of an option.

    Raises:
        UserError: not a list of integers, or a number less than `minimum`.
    """
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        remedy = f"Write for example {minimum},{2 * minimum}."
        raise UserError(option, text, "is not a list of integers", remedy) from None
    if min(counts) < minimum:
        raise UserError(option, text, f"must be at least {minimum}", f"Use {minimum} or more.")
    return counts


def _machine(args: argparse.Namespace, environment: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the hardware and versions to print with the result."""
    hardware = {k: environment[k] for k in ("processor", "device", "threads")}
    names = ["python", "torch", "numpy", "scipy", "mlflow", "dl2pa"]
    if args.name == "matching":
        hardware["processes"] = args.nproc
    elif args.name == "pipeline":
        hardware["load_average"] = [round(load, 1) for load in os.getloadavg()]
        names += ["torchvision", "nvidia-dali-cuda130", "pillow"]
    return hardware, {k: environment[k] for k in names}


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", metavar="LIST", help=f"backbones ({DEFAULT_BACKBONE})")
    parser.add_argument(
        "--loaders",
        default="synthetic",
        metavar="LIST",
        help="data loaders: synthetic, resident, dali, torchvision (synthetic)",
    )
    parser.add_argument(
        "--data", type=nonempty_path, metavar="ROOT", help="image folder for the loaders dali and torchvision"
    )
    parser.add_argument(
        "--image-size", type=int, metavar="S", help="image side in pixels (32 for CIFAR networks, else 224)"
    )
    parser.add_argument("--precision", metavar="LIST", help="fp32, bf16, fp16 (GPU: bf16, CPU: fp32)")
    parser.add_argument("--channels-last", default="on", metavar="LIST", help="on, off (on)")
    parser.add_argument("--compile", default="off", metavar="LIST", help="on, off, graphs (off)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="global batch size (128; ResNet-50 on a CPU: 8)"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="training steps per repetition (20; ResNet-50 on a CPU: 1)"
    )


def _train(args: argparse.Namespace) -> Callable[[Any], Measured]:
    switch = ("off", "on")
    models = words("--models", args.models or DEFAULT_BACKBONE, tuple(BACKBONES))
    loaders = words("--loaders", args.loaders, TRAIN_LOADERS)
    precisions = args.precision and words("--precision", args.precision, PRECISIONS)
    channels_last = [word == "on" for word in words("--channels-last", args.channels_last, switch)]
    compile = [COMPILE[word] for word in words("--compile", args.compile, tuple(COMPILE))]
    check_folder(args.data)
    for model, loader in itertools.product(models, loaders):
        check_loader(loader, model, args.data)

    def measurement(world: Any) -> Measured:
        from dl2pa.bench.train import TrainOptions, bench_train

        gpu = world.device.type == "cuda"
        # Smaller defaults, so that ResNet-50 on a CPU takes less than 10 minutes.
        slow = args.models is None and not gpu
        options = TrainOptions(
            models=models,
            loaders=loaders,
            precisions=precisions or ["bf16" if gpu else "fp32"],
            channels_last=channels_last,
            compile=compile,
            batch_size=args.batch_size or (8 if slow else 128),
            steps=args.steps or (1 if slow else 20),
            root=args.data,
            image_size=args.image_size,
        )
        ratios, rows, ceilings = bench_train(options, args.rounds, world)
        return ratios, rows, {"ceilings": ceilings}

    return measurement


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loaders", metavar="LIST", help="ours, native-dali, torchvision, synthetic, packed (all but packed)"
    )
    parser.add_argument(
        "--data", type=nonempty_path, metavar="ROOT", help="image folder (default: generated JPEGs)"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="batch size (64)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="batches per repetition (20)")


def _pipeline(args: argparse.Namespace) -> Callable[[Any], Measured]:
    loaders = [*LOADERS] if args.loaders is None else words("--loaders", args.loaders, (*LOADERS, PACKED))
    check_folder(args.data)

    def measurement(_world: Any) -> Measured:
        from dl2pa.bench.pipeline import bench_pipeline

        if args.data is None and set(loaders) != {"synthetic"}:
            log.info("no --data: generating JPEGs of 500 x 375 pixels in a temporary folder")
        return *bench_pipeline(loaders, args.data, args.batch_size, args.steps, args.rounds), {}

    return measurement


def _add_matching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--classes", default="100,1000", metavar="LIST", help="class counts (100,1000)")
    parser.add_argument("--dim", type=int, default=512, metavar="D", help="embedding dimension (512)")
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="number of processes (2)")


def _matching(args: argparse.Namespace) -> Callable[[Any], Measured]:
    counts = numbers("--classes", args.classes, 2)

    def measurement(_world: Any) -> Measured:
        from dl2pa.bench.matching import bench_matching

        rows = bench_matching(counts, args.dim, args.rounds, args.nproc)
        ratios = {
            f"update/{name} ({row['classes']} {row['state']})": row["update_s"] / row[f"{name}_s"]
            for row in rows
            for name in ("scipy", "lapx")
            if row[f"{name}_s"]
        }
        return ratios, rows, {}

    return measurement


def _add_scaling(parser: argparse.ArgumentParser) -> None:
    add_steps(parser, SMALL_BACKBONE)
    parser.add_argument("--processes", default="1,2,4", metavar="LIST", help="process counts (1,2,4)")
    parser.add_argument(
        "--step-ms",
        type=float,
        metavar="X",
        help="step time of one GPU in ms, for the estimate for many GPUs (default: measured on this machine)",
    )


def _scaling(args: argparse.Namespace) -> Callable[[Any], Measured]:
    model, counts = one_model(args), numbers("--processes", args.processes, 1)
    if args.step_ms is not None and args.step_ms <= 0:
        raise UserError("--step-ms", args.step_ms, "must be positive", "Give the step time of one GPU.")

    def measurement(_world: Any) -> Measured:
        from dl2pa.bench.scaling import bench_scaling

        measured = args.batch_size, args.steps, args.rounds, args.step_ms
        ratios, rows, model_rows = bench_scaling(model, counts, *measured)
        return ratios, rows, {"model": model_rows}

    return measurement


def _add_classes(parser: argparse.ArgumentParser) -> None:
    add_steps(parser, SMALL_BACKBONE)
    parser.add_argument("--classes", default="100,1000", metavar="LIST", help="class counts (100,1000)")
    parser.add_argument("--dim", type=int, default=512, metavar="D", help="embedding dimension (512)")


def _classes(args: argparse.Namespace) -> Callable[[Any], Measured]:
    model, counts = one_model(args), numbers("--classes", args.classes, 2)

    def measurement(world: Any) -> Measured:
        from dl2pa.bench.classes import bench_classes

        steps = args.batch_size, args.steps, args.rounds
        return *bench_classes(model, counts, args.dim, *steps, world), {}

    return measurement


BENCHMARKS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Benchmark]] = {
    "train": (
        "Speed of a training step for given backbones, loaders, precisions and compilation modes.",
        _add_train,
        _train,
    ),
    "pipeline": (
        "Loading speed of training batches from image files, compared with other loaders.",
        _add_pipeline,
        _pipeline,
    ),
    "matching": (
        "Time and memory of an assignment update, compared with the dense solvers of SciPy and lapx.",
        _add_matching,
        _matching,
    ),
    "scaling": ("Training speed for different numbers of processes.", _add_scaling, _scaling),
    "classes": ("Step time and memory for different numbers of classes.", _add_classes, _classes),
}
