"""`dl2pa predict`: classify image files."""

from __future__ import annotations

import argparse
import json

from dl2pa.commands.options import nonempty_path
from dl2pa.errors import UserError
from dl2pa.rundir import find_model_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=nonempty_path, help="run directory, export or model.safetensors")
    parser.add_argument("images", type=nonempty_path, nargs="+", metavar="IMAGE", help="image file")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes per image (default: 5)")


def run(args: argparse.Namespace) -> int:
    from pipelines.images import check_image_file

    if args.top < 1:
        raise UserError("--top", args.top, "must be at least 1", "Give 1 or more.")
    find_model_file(args.model)
    for path in args.images:
        check_image_file(path)

    from dl2pa.model.compose import load_image_classifier  # imports torch, so it comes after the checks

    classifier = load_image_classifier(args.model)
    predictions: list[dict[str, object]] = []
    for path in args.images:
        top = classifier.predict(path).top(args.top)[0]
        classes = [{"class": guess.name, "probability": guess.probability} for guess in top]
        predictions.append({"image": str(path), "top": classes})
        if not args.json:
            line = ", ".join(f"{guess.name} {100 * guess.probability:.1f} %" for guess in top)
            print(f"{path}: {line}")  # noqa: T201
    if args.json:
        print(json.dumps({"predictions": predictions}))  # noqa: T201
    return 0
