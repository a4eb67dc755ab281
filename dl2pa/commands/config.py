"""`dl2pa config`: print a resolved configuration, or the reference of its keys."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from dl2pa.commands.options import add_overrides, nonempty_path
from dl2pa.errors import UserError

if TYPE_CHECKING:
    from dl2pa.config import Config


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
    parser.add_argument(
        "--groups",
        action="store_true",
        help="print the parameter groups: layers with their learning rate and weight decay",
    )
    parser.add_argument("--markdown", action="store_true", help="with --explain: print docs/configuration.md")


def run(args: argparse.Namespace) -> int:
    print(_reference(args) if args.explain is not None else _resolved(args))  # noqa: T201
    return 0


def _resolved(args: argparse.Namespace) -> str:
    from dl2pa.config import dump_config, load_config
    from dl2pa.config.rate import describe_rate
    from dl2pa.runplan import follow_weights

    if args.config is None:
        raise UserError("command line", "config", "CONFIG is missing", "See `dl2pa config --help`.")
    if args.markdown:
        raise UserError("--markdown", True, "requires --explain", "Leave it out.")
    config = follow_weights(load_config(args.config, args.overrides))
    if args.groups:
        return _groups(config, args.json)
    if args.json:
        return json.dumps(config.model_dump(mode="json"))
    return f"{dump_config(config).rstrip()}\n# Learning rate: {describe_rate(config)}"


def _groups(config: Config, as_json: bool) -> str:
    """Parameter groups of the embedder, from the first layer to the head. A learned classifier is part of the head."""
    from dl2pa.model.model import build_embedder_shapes
    from dl2pa.training.param_groups import param_groups

    optim = config.scaled_optim
    embedder = build_embedder_shapes(config)
    if config.model.freeze_epochs == "all":
        embedder.backbone.requires_grad_(False)
    sizes = {name: p.numel() for name, p in embedder.named_parameters()}
    rows = [
        {
            "lr": optim.lr * group.lr_scale,
            "weight_decay": optim.weight_decay if group.decays else 0.0,
            "tensors": len(group.names),
            "parameters": sum(sizes[name] for name in group.names),
            "names": list(group.names),
        }
        for group in param_groups(embedder, optim)
    ]
    if as_json:
        return json.dumps({"groups": rows})
    head = f"{'lr':>10}  {'decay':>8}  {'tensors':>7}  {'parameters':>11}  names"
    return "\n".join([head, *map(_group_line, rows)])


def _group_line(row: dict[str, Any]) -> str:
    names = row["names"]
    span = "" if not names else names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
    numbers = (
        f"{row['lr']:>10.4g}  {row['weight_decay']:>8.3g}  {row['tensors']:>7}  {row['parameters']:>11,}"
    )
    return f"{numbers}  {span}"


def _reference(args: argparse.Namespace) -> str:
    from dl2pa.config.explain import as_markdown, as_text, explain

    if args.config is not None:
        remedy = f"Remove {args.config}, or --explain."
        raise UserError("--explain", args.explain, "describes keys, not a configuration file", remedy)
    if args.markdown:
        return as_markdown().rstrip("\n")
    keys = explain(args.explain)
    return json.dumps({key.name: key.as_dict() for key in keys}) if args.json else as_text(keys)
