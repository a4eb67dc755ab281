"""`dl2pa evaluate`: evaluate the model of a run, or only its embedding, in one process."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dl2pa.commands.options import add_checkpoint, add_overrides, add_run
from dl2pa.commands.output import say
from dl2pa.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dl2pa.config import Config
    from dl2pa.training.distributed import World
    from pipelines.dataset import Dataset


_CHANGEABLE = ("data.", "launch.", "train.eval_batch_size", "train.precision", "train.channels_last")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_overrides(parser, "data.val_root=DIR")
    add_checkpoint(parser)
    parser.add_argument(
        "--embedding",
        action="store_true",
        help="evaluate the embedding with k-NN and nearest class mean; data.* overrides select another data set",
    )


def run(args: argparse.Namespace) -> int:
    from dl2pa.config.checks import check_input
    from dl2pa.recorded_run import check_weights, load_run_config
    from dl2pa.training.data import build_eval_pipeline, open_split

    _check_overrides(args.overrides)
    config = load_run_config(args.run, args.overrides)
    check_input(config)
    check_weights(args.run, args.checkpoint)
    dataset = open_split(config, "val")

    # These import torch, so they come after the checks.
    from dl2pa.training.distributed import join_world
    from dl2pa.training.evaluate import evaluate
    from dl2pa.training.train_state import autocast
    from dl2pa.training.weights import load_weights

    world = join_world(config)
    if args.embedding:
        return _embedding(args, config, world, dataset)
    classifier = load_weights(args.run, config, args.checkpoint).to(world.device)
    if list(dataset.classes) != classifier.classes:
        field = "data.val_root" if config.data.val_root else "data.root"
        remedy = "Give a data set with the classes of the model, or set data.classes."
        folder = config.data.val_root or config.data.root
        raise UserError(field, folder, "has other classes than the model was trained on", remedy)
    pipeline = build_eval_pipeline(config, dataset, world)
    with autocast(config.train.precision, world.device):
        result = evaluate(classifier.score, pipeline, len(classifier.classes), groups=classifier.groups)
    pipeline.close()
    assert result is not None, "only training stops an evaluation"
    say(result.metrics(), args.json, f"{args.run}:")
    return 0


def _check_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides that have no effect on a trained model."""
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith(_CHANGEABLE):
            remedy = f"Give only keys of {', '.join(_CHANGEABLE)}, or train another model with `dl2pa train`."
            raise UserError(key, override.partition("=")[2], "has no effect on a trained model", remedy)


def _embedding(args: argparse.Namespace, config: Config, world: World, val: Dataset) -> int:
    """Evaluate the embedding; a data set with other classes than those of training measures transfer."""
    from dl2pa.recorded_run import load_run_config
    from dl2pa.training.data import build_eval_pipeline, open_split
    from dl2pa.training.embedding import embed, measure_quality
    from dl2pa.training.train_state import autocast
    from dl2pa.training.weights import load_weights

    weights = load_weights(args.run, load_run_config(args.run, []), args.checkpoint).to(world.device)

    def embed_split(dataset: Dataset) -> tuple[Tensor, Tensor]:
        pipeline = build_eval_pipeline(config, dataset, world)
        with autocast(config.train.precision, world.device):
            embeddings = embed(weights, pipeline)
        pipeline.close()
        return embeddings

    train = open_split(config, "train")
    quality = measure_quality(*embed_split(train), *embed_split(val), len(train.classes))
    say(quality.metrics(), args.json, f"{args.run}, embedding:")
    return 0
