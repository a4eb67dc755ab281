"""The command `dl2pa`: parse, run one module of `dl2pa.commands`, turn errors into messages and exit codes."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from dl2pa import __version__
from dl2pa.commands.hints import check_command, check_options
from dl2pa.commands.options import Parser, add_json
from dl2pa.console import safe_output
from dl2pa.errors import (
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    StorageUnavailable,
    TrainingFailure,
    UserError,
)

COMMANDS = {
    "init": "Write a commented configuration for a folder of images.",
    "train": "Train a configuration; the same command on the same run directory resumes.",
    "submit": "Queue a training on SLURM; the job requeues itself until the run is finished.",
    "resume": "Submit a run again, on the same or other resources.",
    "watch": "Show state, progress and accuracy of all runs below a folder, refreshed until Ctrl-C.",
    "jobs": "List your runs, on the cluster and on this machine, with state, nodes and progress.",
    "logs": "Show the log of a job or a run, errors first.",
    "cancel": "Stop jobs: save a checkpoint, then end without requeueing.",
    "sweep": "Train many configurations, here or on SLURM; the same command resumes.",
    "search": "Search for the best values of keys, stopping worse trials early; the same command continues.",
    "report": "Show finished runs as tables: mean and spread over seeds, last and best epoch.",
    "data": "Index a data set, or pack it into shards.",
    "features": "Compute the features of a frozen network once, to train on them in seconds.",
    "weights": "Fetch pretrained weights for `model.init`, or list those of a backbone.",
    "evaluate": "Evaluate a run's model: accuracy on any images, retrieval, out-of-distribution detection.",
    "sync": "Send a run's spooled tracking events to MLflow, each exactly once.",
    "ui": "Start an MLflow server on the local store, until Ctrl-C.",
    "register": "Register a finished run's model in MLflow; repeating it changes nothing.",
    "predict": "Classify images, folders or lists with a finished run, an export or a model file.",
    "embed": "Write the embeddings of images, folders or lists; the same command continues.",
    "export": "Export a run's model to a self-contained folder.",
    "prototypes": "Construct prototypes and write them with their certificate.",
    "config": "Print a resolved configuration, or explain the configuration keys.",
    "estimate": "Estimate hours, memory and cost of a configuration from a short probe on this machine.",
    "bench": "Run a benchmark; prints ratios and the fastest of n, with hardware and versions.",
    "doctor": "Check versions, devices, DALI, SLURM, MLflow and write access.",
}
"""Help text per command. The command NAME is the module `dl2pa.commands.NAME`: `add_arguments(parser)`, `run(args)`."""


class _PrintCompletion(argparse.Action):
    """Print a completion script and exit."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: Any, option: str | None = None
    ) -> None:
        from dl2pa.commands.completion import completion_script

        print(completion_script(build_parser(*COMMANDS), values))
        parser.exit()


def build_parser(*with_options: str) -> Parser:
    """Return a parser that knows every command, with the options of the commands `with_options` only."""
    parser = Parser(prog="dl2pa", description="Train classifiers on fixed hyperspherical prototypes.")
    parser.add_argument("--version", action="version", version=f"dl2pa {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh"),
        metavar="SHELL",
        help="print a completion script for bash or zsh",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in with_options:
            add_json(command)
            importlib.import_module(f"dl2pa.commands.{name}").add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    with safe_output():
        return _run(list(sys.argv[1:] if argv is None else argv))


def _run(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        args = _parse(arguments)
        return int(importlib.import_module(f"dl2pa.commands.{args.command}").run(args))
    except UserError as error:
        return _report(error.as_dict(), str(error), "--json" in arguments, EXIT_USER_ERROR)
    except BrokenPipeError:  # the reader, for example `| head`, has closed the pipe
        sys.stdout = None
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_DONE
    except (TrainingFailure, StorageUnavailable, OSError) as error:
        fields = {"field": None, "value": None, "message": str(error), "remedy": None}
        return _report(fields, str(error), "--json" in arguments, EXIT_FAILURE)
    except KeyboardInterrupt:
        command = " ".join(["dl2pa", *arguments[:1]])
        print(f"dl2pa: interrupted: `{command}` did not finish", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments. Overrides may also follow options, which argparse alone does not accept."""
    check_command(arguments, COMMANDS)
    parser = build_parser(*arguments[:1])
    try:
        args, rest = parser.parse_known_args(arguments)
    except UserError:
        check_options(arguments, parser.options(), parser.positionals())
        raise
    unknown = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
    if unknown:
        check_options(arguments, parser.options(), parser.positionals())
    if unknown:
        raise UserError("command line", unknown[0], "unknown option", f"See `dl2pa {args.command} --help`.")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _report(fields: dict[str, Any], text: str, as_json: bool, code: int) -> int:
    print(f"dl2pa: {text}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": fields}), flush=True)
    return code
