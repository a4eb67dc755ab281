"""`dl2pa bench`: run one benchmark and say on what it ran."""

from __future__ import annotations

import argparse

from dl2pa.commands.output import say
from dl2pa.errors import UserError


def run(args: argparse.Namespace) -> int:
    from dl2pa.bench.matching import bench_matching
    from dl2pa.config import Config
    from dl2pa.training.environment import describe_environment
    from dl2pa.training.processes import join_world

    try:
        counts = [int(text) for text in str(args.classes).split(",")]
    except ValueError:
        raise UserError("--classes", args.classes, "is no list of numbers", "Write 100,1000.") from None
    if min(counts) < 2 or args.dim < 1 or args.rounds < 1:
        raise UserError(
            "--classes", args.classes, "with --dim and --rounds: out of range", "Use 2 or more, 1 or more."
        )
    environment = describe_environment(join_world(Config()))
    rows = bench_matching(counts, args.dim, args.rounds)
    hardware = {k: environment[k] for k in ("processor", "device", "threads", "world_size")}
    versions = {k: environment[k] for k in ("python", "torch", "numpy", "scipy", "dl2pa")}
    if args.json:
        result = {"bench": args.name, "ratios": {}, "rows": rows, "n": args.rounds}
        say({**result, "hardware": hardware, "versions": versions}, True, "")
        return 0
    say({**hardware, **versions, "n": args.rounds}, False, f"bench {args.name}:")
    for row in rows:
        say(row, False, "")
    return 0
