"""`dl2pa config`: print a resolved configuration, or the reference of its keys."""

from __future__ import annotations

import argparse
import json

from dl2pa.commands.options import add_overrides, nonempty_path
from dl2pa.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=nonempty_path, nargs="?", help="YAML configuration")
    add_overrides(parser, "train.epochs=5")
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="KEY",
        help="print type, default and meaning of a key (optim.lr), of a section (optim) or of all keys",
    )
    parser.add_argument("--markdown", action="store_true", help="with --explain: print docs/configuration.md")


def run(args: argparse.Namespace) -> int:
    print(_reference(args) if args.explain is not None else _resolved(args))  # noqa: T201
    return 0


def _resolved(args: argparse.Namespace) -> str:
    from dl2pa.config import dump_config, load_config

    if args.config is None:
        raise UserError("command line", "config", "CONFIG is missing", "See `dl2pa config --help`.")
    config = load_config(args.config, args.overrides)
    return json.dumps(config.model_dump(mode="json")) if args.json else dump_config(config).rstrip()


def _reference(args: argparse.Namespace) -> str:
    from dl2pa.config.explain import as_markdown, as_text, explain

    if args.config is not None:
        remedy = f"Remove {args.config}, or --explain."
        raise UserError("--explain", args.explain, "describes keys, not a configuration file", remedy)
    if args.markdown:
        return as_markdown().rstrip("\n")
    keys = explain(args.explain)
    return json.dumps({key.name: key.as_dict() for key in keys}) if args.json else as_text(keys)
