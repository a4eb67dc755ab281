"""`dl2pa export`: a run's model as one folder that stands alone."""

from __future__ import annotations

import argparse
import json
import os
import shutil

from dl2pa.commands.output import say
from dl2pa.errors import UserError


def run(args: argparse.Namespace) -> int:
    from dl2pa.inference import load_classifier
    from dl2pa.training.saved import load_run_config, model_file

    config = load_run_config(args.run, ())
    out = args.out or args.run / "export"
    source = model_file(args.run, config, args.checkpoint)
    classifier = load_classifier(source)
    target = out / "model.safetensors"
    aside = out / f".model.{os.getpid()}.aside"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if target.resolve() != source.resolve():
            shutil.copyfile(source, aside)
            aside.replace(target)
        description = json.dumps(classifier.description, indent=1) + "\n"
        (out / "model.json").write_text(description, encoding="utf-8")
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(
            "--out", str(out), f"cannot be written ({error.strerror})", "Choose another."
        ) from None
    result = {"file": str(target), "classes": len(classifier.classes), "bytes": target.stat().st_size}
    say(result, args.json, "exported:")
    return 0
