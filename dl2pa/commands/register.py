"""`dl2pa register`: a finished run's model as a version of a registered one."""

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
    parser.add_argument("--uri", help="MLflow server or store (default: the run's own)")


def run(args: argparse.Namespace) -> int:
    from dl2pa.tracking.registry import check_names, register_model

    check_names(args.name, args.alias)  # before anything heavy is imported

    from dl2pa.config.tracking import check_uri
    from dl2pa.osutil import read_json
    from dl2pa.redaction import has_hidden_credentials
    from dl2pa.rundir import RunDirectory
    from dl2pa.tracking import choose_uri, sync
    from dl2pa.tracking.payloads import model_payload
    from dl2pa.tracking.spool import load_identity
    from dl2pa.tracking.sync import resolve_uri
    from dl2pa.training.weights import load_run_config, model_file

    if args.uri is not None:
        check_uri("--uri", args.uri)
    config = load_run_config(args.run, ())
    model_file(args.run, config, "final")
    directory = RunDirectory(args.run)
    identity = load_identity(args.run)
    if directory.status().get("state") != "finished":
        raise UserError("run", str(args.run), "is not finished", "Let `dl2pa train` finish it.")
    if identity is None:
        remedy = "Only a run with tracking.enabled=true is known to a server."
        raise UserError("run", str(args.run), "was not tracked", remedy)
    recorded = choose_uri(config.tracking.uri, args.run.absolute().parent)
    if recorded is not None and has_hidden_credentials(recorded):
        recorded = None  # the stored copy: the full address comes from --uri or the environment
    uri = resolve_uri(args.run, args.uri, recorded)
    sent = sync(args.run, args.uri, recorded=recorded)
    if sent.run_id is None or sent.error is not None:
        raise UserError("--uri", sent.uri, f"did not take the run: {sent.error}", "See whether it answers.")
    model = model_payload(directory, config, read_json(directory.result))
    example = directory.find_example()
    fields = {**model, "example": None if example is None else example.name}
    registered = register_model(uri, sent.run_id, args.run, fields, args.name, args.alias)
    for alias, version in registered.moved_from.items():
        note(f"{alias} was version {version} before")
    say(dataclasses.asdict(registered), args.json, "registered:")
    return EXIT_DONE
