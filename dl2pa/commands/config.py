"""`dl2pa config`: print a configuration with bases, overrides and defaults resolved."""

from __future__ import annotations

import argparse
import json

from dl2pa.config import dump_config, load_config


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    text = json.dumps(config.model_dump(mode="json")) if args.json else dump_config(config).rstrip()
    print(text)  # noqa: T201
    return 0
