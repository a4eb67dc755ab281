"""`dl2pa bench NAME`: measure a part of the program, side by side in one run, with hardware and versions."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from typing import Any

from dl2pa.commands.options import nonempty_path
from dl2pa.commands.output import say
from dl2pa.config.schema import BACKBONES
from dl2pa.errors import UserError
from dl2pa.osutil import usable_cores

log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]
_COMPILE: dict[str, Any] = {"off": False, "on": True, "graphs": "graphs"}
_OF_STEPS = ("train", "scaling", "together", "checkpoint", "classes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        choices=(
            "pipeline",
            "train",
            "scaling",
            "together",
            "checkpoint",
            "matching",
            "classes",
            "index",
            "tracking",
        ),
        help="what to measure",
    )
    parser.add_argument(
        "--classes", default="100,1000", help="comma-separated class counts (default 100,1000)"
    )
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--points", type=int, default=100_000, help="tracking: metric points a run (100000)")
    parser.add_argument("--runs", type=int, default=3, help="tracking: runs at a time (3)")
    parser.add_argument(
        "--entries", default="1281167", help="index: comma-separated numbers of images (default 1281167)"
    )
    parser.add_argument(
        "--models",
        metavar="LIST",
        help="backbones (train: resnet50; scaling, together, checkpoint, classes: resnet32)",
    )
    parser.add_argument(
        "--step-ms",
        type=float,
        metavar="X",
        help="scaling: of one GPU, for the model of many (this machine's)",
    )
    parser.add_argument("--processes", default="1,2,4", metavar="LIST", help="scaling, together (1,2,4)")
    parser.add_argument(
        "--loaders",
        metavar="LIST",
        help="train: synthetic, resident, dali, torchvision (synthetic); pipeline: ours, native-dali, torchvision, "
        "synthetic (these four), packed",
    )
    parser.add_argument(
        "--data", type=nonempty_path, metavar="ROOT", help="folder of images (pipeline: JPEGs made up for it)"
    )
    parser.add_argument(
        "--image-size", type=int, metavar="S", help="train: pixels (32 for CIFAR's networks, else 224)"
    )
    parser.add_argument("--precision", metavar="LIST", help="fp32, bf16, fp16 (GPU: bf16, CPU: fp32)")
    parser.add_argument("--channels-last", default="on", metavar="LIST", help="train: on, off (on)")
    parser.add_argument("--compile", default="off", metavar="LIST", help="train: on, off, graphs (off)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="(128; pipeline: 64; ResNet-50 on a CPU: 8)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="a turn (20; ResNet-50 on a CPU: 1)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="matching: processes (2)")


def run(args: argparse.Namespace) -> int:
    from dl2pa.config import Config
    from dl2pa.config.schema import LaunchConfig
    from dl2pa.training.distributed import join_world
    from dl2pa.training.environment import describe_environment

    for option in ("rounds", "nproc", "dim", "points", "runs", "batch_size", "steps", "image_size"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise UserError(
                f"--{option.replace('_', '-')}", getattr(args, option), "is not positive", "Give 1 or more."
            )
    _numbers("--classes", args.classes, 2, "two classes")
    _numbers("--entries", args.entries, 64, "a batch")
    # A tracking server on the same machine gets a core to itself, as it would have elsewhere.
    spare = args.name == "tracking"
    threads = max(1, usable_cores() - 1) if spare else None
    _fill_in(args)
    world = join_world(Config(launch=LaunchConfig(threads=threads)))
    environment = describe_environment(world)
    ratios: dict[str, float] = {}
    more: dict[str, Rows] = {}
    if args.name == "tracking":
        from dl2pa.bench.tracking import bench_tracking

        ratios, rows = bench_tracking(args.points, args.runs, args.rounds, world)
    elif args.name == "pipeline":
        ratios, rows = _pipeline(args)
    elif args.name in _OF_STEPS:
        ratios, rows, more = _steps(args, world)
    elif args.name == "index":
        from dl2pa.bench.index import bench_index

        rows = bench_index(_numbers("--entries", args.entries, 64, "a batch"), args.rounds)
    else:
        ratios, rows = _matching(args)
    hardware, versions = _machine(args, environment)
    if args.json:
        result = {"bench": args.name, "ratios": ratios, "rows": rows, **more, "n": args.rounds}
        say({**result, "hardware": hardware, "versions": versions}, True, "")
        return 0
    say({**hardware, **versions, "n": args.rounds}, False, f"bench {args.name}:")
    for row in [*rows, *(row for found in more.values() for row in found), *([ratios] if ratios else [])]:
        say(row, False, "")
    return 0


def _steps(args: argparse.Namespace, world: Any) -> tuple[dict[str, float], Rows, dict[str, Rows]]:
    """What takes training steps."""
    if args.name == "train":
        from dl2pa.bench.train import bench_train

        ratios, rows, ceilings = bench_train(_choices(args), args.rounds, world)
        return ratios, rows, {"ceilings": ceilings}
    if args.name == "together":
        from dl2pa.bench.together import bench_together

        return *bench_together(*_together(args)), {}
    if args.name == "checkpoint":
        from dl2pa.bench.checkpoint import bench_checkpoint

        models = _words("--models", args.models, BACKBONES)
        return *bench_checkpoint(
            models, args.batch_size, args.steps, args.rounds, _precision(args), world
        ), {}
    if args.name == "classes":
        from dl2pa.bench.classes import bench_classes

        (model,) = _words("--models", args.models, BACKBONES, most=1)
        counts = _numbers("--classes", args.classes, 2, "two classes")
        return *bench_classes(model, counts, args.dim, args.batch_size, args.steps, args.rounds, world), {}
    from dl2pa.bench.scaling import bench_scaling

    (model,) = _words("--models", args.models, BACKBONES, most=1)
    counts = _numbers("--processes", args.processes, 1, "one process")
    if args.step_ms is not None and args.step_ms <= 0:
        raise UserError("--step-ms", args.step_ms, "is not positive", "Give a GPU's time for a step.")
    measured = args.batch_size, args.steps, args.rounds, args.step_ms
    ratios, rows, modelled = bench_scaling(model, counts, *measured)
    return ratios, rows, {"model": modelled}


def _fill_in(args: argparse.Namespace) -> None:
    """Defaults that depend on what is measured and on what: ResNet-50 on a CPU within ten minutes."""
    import torch

    gpu = torch.cuda.is_available()
    large = args.name == "train" and args.models is None and not gpu
    args.models = args.models or ("resnet50" if args.name == "train" else "resnet32")
    args.precision = args.precision or ("bf16" if gpu else "fp32")
    args.batch_size = args.batch_size or (64 if args.name == "pipeline" else 8 if large else 128)
    args.steps = args.steps or (1 if large else 20)


def _machine(args: argparse.Namespace, environment: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What it ran on, and versions of what matters to it."""
    hardware = {k: environment[k] for k in ("processor", "device", "threads")}
    names = ["python", "torch", "numpy", "scipy", "mlflow", "dl2pa"]
    if args.name == "matching":
        hardware["processes"] = args.nproc
    elif args.name == "pipeline":
        hardware["load_average"] = [round(load, 1) for load in os.getloadavg()]
        names += ["torchvision", "nvidia-dali-cuda130", "pillow"]
    return hardware, {k: environment[k] for k in names}


def _pipeline(args: argparse.Namespace) -> tuple[dict[str, float], Rows]:
    from dl2pa.bench.loaders import LOADERS, PACKED
    from dl2pa.bench.pipeline import bench_pipeline

    known = (*LOADERS, PACKED)
    loaders: list[str] = [*LOADERS] if args.loaders is None else _words("--loaders", args.loaders, known)
    if args.data is None and set(loaders) != {"synthetic"}:
        log.info("no --data: JPEGs of 500 x 375 pixels made up in a temporary folder")
    return bench_pipeline(loaders, args.data, args.batch_size, args.steps, args.rounds)


def _matching(args: argparse.Namespace) -> tuple[dict[str, float], Rows]:
    from dl2pa.bench.matching import bench_matching

    counts = _numbers("--classes", args.classes, 2, "two classes")
    rows = bench_matching(counts, args.dim, args.rounds, args.nproc)
    ratios = {
        f"update/{name} ({row['classes']} {row['state']})": row["update_s"] / row[f"{name}_s"]
        for row in rows
        for name in ("scipy", "lapx")
        if row[f"{name}_s"]
    }
    return ratios, rows


def _choices(args: argparse.Namespace) -> Any:
    from dl2pa.bench.train import LOADERS, PRECISIONS, Choices

    switch = ("off", "on")
    return Choices(
        models=_words("--models", args.models, BACKBONES),
        loaders=_words("--loaders", args.loaders or "synthetic", LOADERS),
        precisions=_words("--precision", args.precision, PRECISIONS),
        channels_last=[word == "on" for word in _words("--channels-last", args.channels_last, switch)],
        compile=[_COMPILE[word] for word in _words("--compile", args.compile, tuple(_COMPILE))],
        batch_size=args.batch_size,
        steps=args.steps,
        root=args.data,
        image_size=args.image_size,
    )


def _together(args: argparse.Namespace) -> tuple[Any, ...]:
    from dl2pa.backbones import is_small

    small = [name for name in BACKBONES if is_small(name)]
    (model,) = _words("--models", args.models, small, most=1)
    counts = _numbers("--processes", args.processes, 1, "one run")
    (compile,) = _words("--compile", args.compile, tuple(_COMPILE), most=1)
    return model, counts, args.batch_size, args.steps, args.rounds, _precision(args), _COMPILE[compile]


def _precision(args: argparse.Namespace) -> str:
    from dl2pa.bench.train import PRECISIONS

    return _words("--precision", args.precision, PRECISIONS, most=1)[0]


def _words(option: str, text: str, known: Sequence[str], most: int | None = None) -> list[str]:
    words = text.split(",")
    if most is not None and len(words) > most:
        raise UserError(option, text, f"has more than {most}", f"Give {most}.")
    for word in words:
        if word not in known:
            raise UserError(option, word, "is unknown", f"Use one or more of {','.join(known)}.")
    return list(dict.fromkeys(words))


def _numbers(option: str, text: str, least: int, what: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(option, text, "is no list of numbers", f"Write {least},{2 * least}, say.") from None
    if min(counts) < least:
        raise UserError(option, text, f"has fewer than {what}", f"Use {least} or more.")
    return counts
