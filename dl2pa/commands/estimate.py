"""`dl2pa estimate`: what a configuration will take, from a short probe of it here."""

from __future__ import annotations

import argparse

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
        default=50.0,
        metavar="GB/S",
        help="bandwidth between devices per direction (default: 50)",
    )
    parser.add_argument("--price", type=float, metavar="X", help="price per device-hour")


def run(args: argparse.Namespace) -> int:
    from dl2pa.bench.estimate import Target, estimate
    from dl2pa.config import load_config
    from dl2pa.training.data import open_data
    from dl2pa.training.distributed import join_world
    from dl2pa.training.environment import describe_environment

    for option in ("devices", "steps", "link", "price"):
        value = getattr(args, option)
        if value is not None and value <= 0:
            raise UserError(f"--{option}", value, "is not positive", "Give a positive number.")
    config = load_config(args.config, args.overrides)
    world = join_world(config)
    target = Target(args.devices, args.link, args.price)
    try:
        data = open_data(config, args.devices)
    except UserError as error:
        field = "--devices" if error.field == "launch.nproc" else error.field
        raise UserError(field, error.value, error.message, error.remedy) from None
    found = estimate(config, data, world, target, args.steps)
    environment = describe_environment(world)
    measured_on = {key: environment[key] for key in ("device", "processor", "threads", "torch")}
    result = {**found, "devices": args.devices, "n": args.steps, **measured_on}
    say(result, args.json, f"{args.config.name}, by {args.steps} steps on this machine:")
    return 0
