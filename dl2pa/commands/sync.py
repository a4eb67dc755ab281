"""`dl2pa sync`: send what a tracking server missed."""

from __future__ import annotations

import argparse
import dataclasses

from dl2pa.commands.output import say
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, UserError


def run(args: argparse.Namespace) -> int:
    from dl2pa.config import load_config
    from dl2pa.tracking import choose_uri, has_hidden_credentials, sync
    from dl2pa.training.rundir import RunDirectory, is_owned

    failed = False
    for path in args.run:
        directory = RunDirectory(path)
        if not directory.config.is_file():
            raise UserError("run", str(path), "is not a run directory", "Give the folder a run wrote.")
        uri = args.uri or choose_uri(load_config(directory.config).tracking.uri, path.absolute().parent)
        if uri is not None and has_hidden_credentials(uri):
            uri = None  # the stored copy: the full address comes from --uri or the environment
        report = sync(path, uri, alive=is_owned(directory))
        fields = dataclasses.asdict(report)
        failed = failed or bool(fields.get("error"))
        say({k: _plain(v) for k, v in fields.items()}, args.json, f"{path}:")
    return EXIT_FAILURE if failed else EXIT_DONE


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, str | int | float) else str(value)
