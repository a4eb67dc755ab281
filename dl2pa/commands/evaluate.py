"""`dl2pa evaluate`: validate the model of a run in one process."""

from __future__ import annotations

import argparse

from dl2pa.commands.output import say
from dl2pa.errors import UserError


def run(args: argparse.Namespace) -> int:
    from dl2pa.training.data import build_eval_pipeline, open_split
    from dl2pa.training.evaluate import evaluate
    from dl2pa.training.learner import autocast
    from dl2pa.training.processes import join_world
    from dl2pa.training.saved import load_run_config, load_weights

    config = load_run_config(args.run, args.overrides)
    world = join_world(config)
    dataset = open_split(config, "val")
    classifier = load_weights(args.run, config, args.checkpoint).to(world.device)
    if list(dataset.classes) != classifier.classes:
        raise UserError(
            "data.val_root",
            config.data.val_root or config.data.root,
            "its classes are not those the model was trained on",
            "Give the data set's own classes, or data.classes.",
        )
    pipeline = build_eval_pipeline(config, dataset, world)
    with autocast(config.train.precision, world.device):
        result = evaluate(
            classifier.score, pipeline, len(classifier.classes), world.device, groups=classifier.groups
        )
    pipeline.close()
    assert result is not None, "nobody asks this evaluation to stop"
    say(result.metrics(), args.json, f"{args.run}:")
    return 0
