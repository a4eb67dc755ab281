"""`dl2pa evaluate`: evaluate the model of a run on its validation split or other images, or only its embedding."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dl2pa.commands.options import add_checkpoint, add_overrides, add_run, resolve_nproc_option
from dl2pa.commands.output import note, say, short, table
from dl2pa.errors import EXIT_DONE, UserError
from dl2pa.process import torchrun_ranks
from dl2pa.terms import term

if TYPE_CHECKING:
    from dl2pa.config import Config
    from dl2pa.evaluation.ranks import Job
    from dl2pa.evaluation.sets import NamedSet
    from dl2pa.training.distributed import World
    from pipelines.dataset import Dataset


_CHANGEABLE = ("data.", "launch.", "train.eval_batch_size", "train.precision", "train.channels_last")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_overrides(parser, "data.val_root=DIR")
    add_checkpoint(parser)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="sets",
        metavar="NAME=DIR",
        help="evaluate on the images in DIR (class folders, or the index of lists, Parquet files or shards) instead of "
        "the validation split; classes are matched by name; can be repeated",
    )
    parser.add_argument(
        "--only-present-classes",
        action="store_true",
        help="with --set: choose among the classes that have images in the set (ImageNet-R, ImageNet-A)",
    )
    parser.add_argument(
        "--ood",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="detect the images in DIR as out of distribution, against the validation split; can be repeated",
    )
    parser.add_argument(
        "--retrieval",
        action="store_true",
        help="recall at 1, 5 and 10 and mean average precision of the embedding, on the validation split or on each "
        "--set, whose classes may be new",
    )
    parser.add_argument(
        "--embedding",
        action="store_true",
        help="evaluate the embedding with k-NN and nearest class mean; data.* overrides select another data set",
    )
    parser.add_argument(
        "--nproc", metavar="N", help="processes on this machine, or auto: one per GPU (default: 1)"
    )


def run(args: argparse.Namespace) -> int:
    from dl2pa.config.checks import check_input
    from dl2pa.evaluation.sets import OOD, SET, open_sets, parse_folders
    from dl2pa.recorded_run import check_weights, load_run_config
    from dl2pa.training.data import open_split

    _check_overrides(args.overrides)
    _check_options(args)
    alone = not (args.sets or args.ood or args.retrieval or args.embedding or args.nproc)
    if torchrun_ranks() is not None and not alone:
        message = "starts this command several times"
        raise UserError("environment", "torchrun", message, "Run it once, with --nproc N.")
    folders, ood = parse_folders(SET, args.sets), parse_folders(OOD, args.ood)
    config = load_run_config(args.run, args.overrides)
    check_input(config)
    nproc = resolve_nproc_option(args.nproc, config.launch.device)
    check_weights(args.run, args.checkpoint)
    sets, outside = open_sets(SET, folders), open_sets(OOD, ood, flat=True)
    needs_validation = not sets or bool(outside)
    val = open_split(config, "val") if needs_validation else None
    if args.embedding:
        assert val is not None, "opened without sets"
        return _embedding(args, config, nproc, val)
    if not (sets or outside or args.retrieval):
        return _validate(args, config, nproc, val)
    return _measure(args, config, nproc, val, sets, outside)


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other."""
    others = {"--set": args.sets, "--ood": args.ood, "--retrieval": args.retrieval}
    for option, value in others.items():
        if args.embedding and value:
            raise UserError(option, value, "cannot be combined with --embedding", "Remove one of them.")
    if args.only_present_classes and (args.retrieval or not args.sets):
        message = "chooses among the classes of a set, which this command does not classify"
        raise UserError("--only-present-classes", True, message, "Remove it, or add --set NAME=DIR.")


def _check_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides that have no effect on a trained model."""
    from dl2pa.config import flat_overrides

    for key, value in flat_overrides(overrides).items():
        if not key.startswith(_CHANGEABLE):
            remedy = f"Give only keys of {', '.join(_CHANGEABLE)}, or train another model with `dl2pa train`."
            raise UserError(key, value, "has no effect on a trained model", remedy)


def _validate(args: argparse.Namespace, config: Config, nproc: int, val: Dataset | None) -> int:
    """Evaluate on the validation split."""
    from dl2pa.evaluation.measure import check_classes, evaluate_split
    from dl2pa.evaluation.ranks import evaluate_on_ranks
    from dl2pa.evaluation.record import metrics_of
    from dl2pa.training.weights import load_weights, model_file

    assert val is not None, "opened without sets"
    world = _join(config, nproc)
    if nproc > 1:
        (result,) = evaluate_on_ranks(_job(args, model_file(args.run, config, args.checkpoint), []), nproc)
    else:
        classifier = load_weights(args.run, config, args.checkpoint).to(world.device)
        check_classes(config, val, classifier)
        result = evaluate_split(config, classifier, val, world)
        if not world.is_main:
            return EXIT_DONE
    say(metrics_of(result), args.json, f"{args.run}:")
    same_data = not any(override.startswith("data.") for override in args.overrides)
    if result.temperature is not None and same_data and _is_fitted_on_validation(args.run):
        note("the temperature was fitted on the validation split; its results by cross-fitting: result.json")
    return EXIT_DONE


def _is_fitted_on_validation(run: Path) -> bool:
    from dl2pa.rundir import RunDirectory

    return RunDirectory(run).read_result().get("calibrated_on") == "validation"


def _join(config: Config, nproc: int) -> World:
    """World of this process, which starts `nproc` others if more than one; checks that the devices exist."""
    from dl2pa.training.distributed import choose_device, join_world

    choose_device(config.launch.device, nproc - 1)
    return join_world(config)


def _measure(
    args: argparse.Namespace,
    config: Config,
    nproc: int,
    val: Dataset | None,
    sets: Sequence[NamedSet],
    outside: Sequence[NamedSet],
) -> int:
    """Measure everything that is asked for on named sets, record and print it.

    Args:
        val: the validation split, if it is needed.
    """
    from dl2pa.evaluation.record import Recorder
    from dl2pa.evaluation.session import Session
    from dl2pa.training.weights import model_file

    recorder = Recorder(args.run, config) if args.checkpoint == "final" else None
    job = _job(args, model_file(args.run, config, args.checkpoint), sets)
    session = Session(config, job, recorder, _join(config, nproc), nproc)
    if args.retrieval:
        session.retrieve(sets, val)
    elif sets:
        session.classify(sets)
    if outside:
        assert val is not None, "opened for out-of-distribution sets"
        session.detect(outside, val)
    notes = ["not recorded: only evaluations of the final model are recorded"]
    for text in notes if recorder is None else recorder.send():
        note(text)
    _print(session.results, args.json)
    return EXIT_DONE


def _job(args: argparse.Namespace, model: Path, sets: Sequence[NamedSet]) -> Job:
    from dl2pa.evaluation.ranks import Job

    named = [(one.name, str(one.root.absolute())) for one in sets]
    return Job(
        str(args.run.absolute()), args.overrides, str(model.absolute()), named, args.only_present_classes
    )


def _print(results: dict[str, dict[str, Any]], as_json: bool) -> None:
    """Print one JSON object, or a table of the sets and one list per other result."""
    if as_json:
        say(results, True, "")
        return
    sets = results.get("sets", {})
    if sets:
        calibrated = next(iter(sets.values())).get("temperature") is not None
        names = [*_PROBABILITIES, *(_CALIBRATED if calibrated else {})]
        head = ("set", "images", "classes", "correct", "top-1 %", "95 % interval", "top-5 %")
        table([(*head, *map(term, names)), *(_row(name, result, names) for name, result in sets.items())])
    for kind in ("retrieval", "ood"):
        for name, result in results.get(kind, {}).items():
            say(result, False, f"{kind}, {name}:")


_PROBABILITIES, _CALIBRATED = ("ece", "nll"), ("ece_calibrated", "nll_calibrated", "temperature")


def _row(name: str, result: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    counts = (f"{result[key]:,}" for key in ("num_validated", "num_classes", "num_correct"))
    interval = f"{result['top1_low']:.2f} to {result['top1_high']:.2f}"
    percentages = f"{result['top1']:.2f}", interval, f"{result['top5']:.2f}"
    return name, *counts, *percentages, *(short(result[key]) for key in names)


def _embedding(args: argparse.Namespace, config: Config, nproc: int, val: Dataset) -> int:
    """Evaluate the embedding; a data set with other classes than those of training measures transfer."""
    from dl2pa.evaluation.session import Session
    from dl2pa.recorded_run import load_run_config
    from dl2pa.training.weights import model_file

    world = _join(config, nproc)
    model = model_file(args.run, load_run_config(args.run, []), args.checkpoint)
    quality = Session(config, _job(args, model, []), None, world, nproc).embedding(val)
    say(quality.metrics(), args.json, f"{args.run}, embedding:")
    return EXIT_DONE
