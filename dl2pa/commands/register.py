"""`dl2pa register`: register the model of a finished run as a model version in MLflow."""

from __future__ import annotations

import argparse
import dataclasses

from dl2pa.commands.options import add_run
from dl2pa.commands.output import note, say
from dl2pa.errors import EXIT_DONE, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--name", required=True, help="registered model; created if it does not exist")
    parser.add_argument(
        "--alias", action="append", default=[], help="set this alias, for example champion; can be repeated"
    )
    parser.add_argument("--uri", help="MLflow server or store (default: that of the run)")


def run(args: argparse.Namespace) -> int:
    from dl2pa.tracking.registry import check_names, register_model

    check_names(args.name, args.alias)  # before the slow imports

    from dl2pa.config.tracking import check_uri
    from dl2pa.recorded_run import check_weights, load_run_config
    from dl2pa.rundir import RunDirectory
    from dl2pa.specs import FEATURES
    from dl2pa.tracking.payloads import model_payload
    from dl2pa.tracking.spool import load_identity
    from dl2pa.tracking.sync import recorded_server, resolve_uri, sync

    if args.uri is not None:
        check_uri("--uri", args.uri)
    config = load_run_config(args.run, ())
    if config.data.dataset == FEATURES:
        remedy = f"Run `dl2pa export {args.run} --mlflow`, and register the folder that it writes."
        raise UserError(
            "run", str(args.run), "has a model of features; MLflow serves models of images", remedy
        )
    check_weights(args.run, "final")
    directory = RunDirectory(args.run)
    identity = load_identity(args.run)
    if directory.status().get("state") != "finished":
        raise UserError("run", str(args.run), "is not finished", "Finish it with `dl2pa train`.")
    if identity is None:
        remedy = "Train with tracking.enabled=true."
        raise UserError("run", str(args.run), "was not tracked", remedy)
    result = directory.read_result()
    recorded = recorded_server(args.run, config.tracking.uri)
    uri = resolve_uri(args.run, args.uri, recorded)
    sent = sync(args.run, args.uri, recorded=recorded)
    if sent.run_id is None or sent.error is not None:
        message = f"did not accept the run: {sent.error}"
        raise UserError("--uri", sent.uri, message, "Check that the server answers.")
    model = model_payload(directory, config, result)
    example = directory.find_example()
    fields = {**model, "example": None if example is None else example.name}
    registered = register_model(uri, sent.run_id, args.run, fields, args.name, args.alias)
    for alias, version in registered.moved_from.items():
        note(f"alias {alias} moved from version {version}")
    say(dataclasses.asdict(registered), args.json, "registered:")
    return EXIT_DONE
