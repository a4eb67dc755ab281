"""`dl2pa export`: a run's model as one folder that stands alone."""

from __future__ import annotations

import argparse
import json
import shutil

from dl2pa.commands.output import say


def run(args: argparse.Namespace) -> int:
    from dl2pa.inference import load_classifier
    from dl2pa.training.saved import load_run_config, model_file

    config = load_run_config(args.run, ())
    out = args.out or args.run / "export"
    source = model_file(args.run, config, args.checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    target = out / "model.safetensors"
    shutil.copyfile(source, target)
    classifier = load_classifier(target)
    (out / "model.json").write_text(json.dumps(classifier.description, indent=1) + "\n", encoding="utf-8")
    result = {"file": str(target), "classes": len(classifier.classes), "bytes": target.stat().st_size}
    say(result, args.json, "exported:")
    return 0
