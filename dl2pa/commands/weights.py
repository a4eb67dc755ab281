"""`dl2pa weights`: fetch pretrained weights into the library's cache, and list those of a backbone."""

from __future__ import annotations

import argparse
import json

from dl2pa.commands.options import Parser, add_json, nonempty_text
from dl2pa.commands.output import say
from dl2pa.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    for name, metavar, summary in (
        ("fetch", "NAME", "Download weights into the cache of their library, unless they are there."),
        ("list", "BACKBONE", "List the pretrained weights of a backbone."),
    ):
        action = actions.add_parser(name, help=summary, description=summary)
        add_json(action, default=argparse.SUPPRESS)  # the default is that of `dl2pa weights --json`
        example = "torchvision:resnet50.IMAGENET1K_V2" if name == "fetch" else "timm:resnet50"
        action.add_argument("name", type=nonempty_text, metavar=metavar, help=f"for example {example}")


def run(args: argparse.Namespace) -> int:
    if args.action == "list":
        _list(args.name, args.json)
        return 0
    from dl2pa.model.weight_sources import fetch, named_weights
    from dl2pa.osutil import sha256_of

    weights = named_weights(args.name)
    path = fetch(weights)
    say({"name": weights.name, "file": str(path), "sha256": sha256_of(path)}, args.json, "fetched:")
    return 0


def _list(backbone: str, as_json: bool) -> None:
    from dl2pa import zoo
    from dl2pa.model.weight_sources import tags_of
    from dl2pa.specs import backbone_spec

    library = backbone_spec(backbone).family
    if library in ("cifar", "vector"):
        remedy = "Name a model of torchvision, or timm:MODEL."
        raise UserError("BACKBONE", backbone, "has no pretrained weights", remedy)
    names = [
        f"{library}:{backbone.removeprefix(zoo.TIMM)}.{tag}"
        for tag in tags_of(library, backbone.removeprefix(zoo.TIMM))
    ]
    print(json.dumps({"weights": names}) if as_json else "\n".join(names))  # noqa: T201
