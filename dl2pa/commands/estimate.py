"""`dl2pa estimate`: training time, memory and cost of a configuration, from a short measurement."""

from __future__ import annotations

import argparse
import math

from dl2pa.bench import LINK_GB_PER_S
from dl2pa.commands.options import add_config
from dl2pa.commands.output import say
from dl2pa.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="GPUs of the same type (default: 1)"
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="measured steps (default: 20)")
    parser.add_argument(
        "--link",
        type=float,
        default=LINK_GB_PER_S,
        metavar="GB/S",
        help=f"bandwidth between devices per direction (default: {LINK_GB_PER_S:.0f})",
    )
    parser.add_argument("--price", type=float, metavar="X", help="price per device-hour")


def run(args: argparse.Namespace) -> int:
    from dl2pa.config import load_config
    from dl2pa.config.places import finder, placed
    from dl2pa.runplan import follow_weights
    from dl2pa.training.data import check_files, open_data

    for option in ("devices", "steps", "link", "price"):
        value = getattr(args, option)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{option}", value, "must be positive and finite", "Give a positive number.")
    try:
        with placed(finder([(args.config, args.overrides)])):
            config = follow_weights(load_config(args.config, args.overrides, check_files))
            data = open_data(config, args.devices)
    except UserError as error:
        for problem in (error, *error.problems):
            problem.field = "--devices" if problem.field == "launch.nproc" else problem.field
        raise

    # These import torch, so they come after the checks.
    from dl2pa.bench.estimate import Target, estimate
    from dl2pa.training.distributed import join_world
    from dl2pa.training.environment import describe_environment

    world = join_world(config)
    target = Target(args.devices, args.link, args.price)
    result = estimate(config, data, world, target, args.steps)
    environment = describe_environment(world)
    result |= {"devices": args.devices, "n": args.steps}
    result |= {key: environment[key] for key in ("device", "processor", "threads", "torch")}
    say(result, args.json, f"{args.config.name}, estimated from {args.steps} steps on this machine:")
    return 0
