"""`dl2pa predict`: classify image files."""

from __future__ import annotations

import argparse
import json

from dl2pa.errors import UserError


def run(args: argparse.Namespace) -> int:
    import torch

    from dl2pa.inference import load_classifier
    from pipelines.single import load_image

    if args.top < 1:
        raise UserError("--top", args.top, "is not a number of classes", "Choose at least 1.")
    classifier = load_classifier(args.model)
    predictions: list[dict[str, object]] = []
    for path in args.images:
        image = load_image(path, **classifier.description["preprocessing"])
        scores = classifier.score(image[None]).softmax(dim=1)[0]
        best = torch.topk(scores, min(args.top, len(scores)))
        top = [
            {"class": classifier.classes[i], "probability": p}
            for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        predictions.append({"image": str(path), "top": top})
        if not args.json:
            shown = ", ".join(f"{t['class']} {100 * float(t['probability']):.1f} %" for t in top)
            print(f"{path}: {shown}")  # noqa: T201
    if args.json:
        print(json.dumps({"predictions": predictions}))  # noqa: T201
    return 0
