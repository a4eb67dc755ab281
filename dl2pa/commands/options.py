"""Parser, argument types and option groups that several commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dl2pa.commands.hints import choice_hint
from dl2pa.errors import UserError
from dl2pa.osutil import full_disk, try_to_write, usable_cores

_MAX_PER_CORE = 8


class Parser(argparse.ArgumentParser):
    """Argument parser that raises `UserError` and accepts no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        remedy = f"{choice_hint(message)}See `{self.prog} --help`."
        raise UserError("command line", " ".join(sys.argv[1:]), message, remedy)

    def options(self) -> set[str]:
        """Return all option names, including those of the commands and actions below."""
        names = set(self._option_string_actions)
        for parser in self._parsers_below():
            names |= parser.options()
        return names

    def positionals(self) -> set[str]:
        """Return the names of all positional arguments, including those of the commands and actions below."""
        names = {action.dest for action in self._actions if not action.option_strings}
        for parser in self._parsers_below():
            names |= parser.positionals()
        return names

    def _parsers_below(self) -> list[Parser]:
        choices = (action.choices for action in self._actions)
        below = (list(each.values()) for each in choices if isinstance(each, dict))
        return [parser for parsers in below for parser in parsers if isinstance(parser, Parser)]


class _Renamed(argparse.Action):
    """Refuse an option under its old name; `const` is the new name."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: Any, option: str | None = None
    ) -> NoReturn:
        raise UserError(str(option), values, f"is now called {self.const}", f"Use {self.const}.")


def add_renamed(parser: argparse.ArgumentParser, old: str, new: str) -> None:
    """Refuse the option `old` with the name `new` in the message."""
    parser.add_argument(old, action=_Renamed, nargs="?", const=new, help=argparse.SUPPRESS)


def nonempty_text(value: str) -> str:
    """Argument type: any text except an empty one, which is usually an unset shell variable."""
    if not value:
        raise argparse.ArgumentTypeError("an empty value (an unset variable?)")
    return value


def nonempty_path(value: str) -> Path:
    """Argument type: a path; an empty one is refused because it would mean the current folder."""
    if not value:
        raise argparse.ArgumentTypeError("an empty path (an unset variable?)")
    if value.startswith("~"):  # bash does not expand the path in --option=~/path
        message = f"{value} is not expanded; write the option and the path as two words, or ./{value}"
        raise argparse.ArgumentTypeError(message)
    return Path(value)


def check_output_folder(option: str, folder: Path) -> None:
    """Check that a folder can be written or created, before the work whose results it receives.

    Raises:
        UserError: names the option.
    """
    _check_writable(option, folder, folder)


def check_output_file(option: str, file: Path) -> None:
    """Check that a file can be written, and its folder created, before the work whose results it receives.

    Raises:
        UserError: names the option; also if it is a folder.
    """
    _check_writable(option, file, file.parent)
    if file.is_dir():
        raise UserError(option, str(file), "is a folder", f"Give the name of a file, as in {file / 'NAME'}.")


def _check_writable(option: str, place: Path, folder: Path) -> None:
    try:
        place.exists()  # refuses names that are too long
        try_to_write(folder)
    except OSError as error:
        if full := full_disk(error, folder, 0):
            raise full from None
        raise UserError(
            option, str(place), f"cannot be written ({error.strerror})", "Choose another."
        ) from None


def add_json(parser: argparse.ArgumentParser, **kwargs: Any) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last output line", **kwargs
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the configuration file and its overrides."""
    parser.add_argument("config", type=nonempty_path, help="YAML configuration")
    add_overrides(parser, "train.epochs=5")


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"for example {example}")


def add_grid(parser: argparse.ArgumentParser, option: str) -> None:
    """Add the option that starts one run per value of a key."""
    parser.add_argument(
        option,
        action="append",
        dest="grid",
        metavar="KEY=VALUES",
        help="one run per value: train.seed=0..4, optim.lr=0.1,0.2, config=A.yaml,B.yaml; "
        "repeat the option for all combinations",
    )


def check_not_varied(overrides: Sequence[str], grid: Sequence[str], option: str = "--grid") -> None:
    """Refuse overrides of the command line for keys of the grid, whose values come last.

    Raises:
        UserError: the first such override.
    """
    from dl2pa.config import flat_overrides
    from dl2pa.config.yaml_core import value_text

    varied = {text.partition("=")[0].strip() for text in grid}
    for text in overrides:
        values = flat_overrides([text])
        if same := sorted(varied & {text.partition("=")[0].strip(), *values}):
            message = "has no effect, because the grid varies this key"
            value = f"{same[0]}={value_text(values[same[0]])}" if same[0] in values else text
            remedy = f"Leave it out, or replace the values of the grid: {option} {value}."
            raise UserError("override", text, message, remedy)


def add_run(parser: argparse.ArgumentParser, **kwargs: Any) -> None:
    settings: dict[str, Any] = {"help": "run directory", **kwargs}
    parser.add_argument("run", type=nonempty_path, **settings)


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-dir",
        type=nonempty_path,
        metavar="DIR",
        help="run directory (default: runs/<config>-<fingerprint>)",
    )


def add_tables(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tables",
        type=nonempty_path,
        metavar="FILE",
        help="published tables (default: configs/published.yaml)",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        choices=("final", "latest", "best"),
        default="final",
        help="weights to use (default: final)",
    )


def cores_policy(value: str) -> int | str:
    """Argument type: a number of cores, `auto` or `site`."""
    if value in ("auto", "site"):
        return value
    if not value.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{value} is not a number, auto or site")
    return int(value)


def add_slurm_request(parser: argparse.ArgumentParser, *, resumes: bool = False) -> None:
    """Add the options of a SLURM job. They have no defaults here: `launcher.request.Request` has them.

    Args:
        resumes: the job continues a run, and options that are not given have the values of the last job.
    """

    def default(value: int | str) -> str:
        return "" if resumes else f" (default: {value})"

    kept = "Options that are not given have the values of the last job, except --after." if resumes else None
    add = parser.add_argument_group("SLURM job", kept).add_argument
    add("--nodes", type=int, metavar="N", help=f"number of nodes{default(1)}")
    add(
        "--gpus-per-node",
        type=nonempty_text,
        metavar="[TYPE:]G",
        help="GPUs and processes per node, for example 8 or h100:8; 0 starts launch.nproc processes on CPUs"
        + default(1),
    )
    add(
        "--time",
        type=nonempty_text,
        metavar="T",
        help="time limit per attempt: minutes, H:MM:SS or D-HH:MM:SS",
    )
    add("--stop-before", type=int, metavar="S", help=f"seconds before the limit to save at{default(180)}")
    for name in ("partition", "account", "qos", "constraint", "exclude", "mem"):
        add(f"--{name}", type=nonempty_text, metavar=name[0].upper(), help=f"passed to sbatch as --{name}")
    add(
        "--cpus-per-gpu",
        type=cores_policy,
        metavar="N",
        help="CPU cores per process; auto: the cores per GPU of the partition; site: request none"
        + default("auto"),
    )
    image = "image to run in, with Pyxis or Apptainer; none: no image"
    add("--container", type=nonempty_text, metavar="IMAGE", help=image)
    add(
        "--sbatch",
        action="append",
        type=nonempty_text,
        metavar="KEY[=VALUE]",
        help="any other option of sbatch: gres=gpu:h100:8, reservation=NAME, exclusive; can be repeated",
    )
    add(
        "--profile",
        type=nonempty_text,
        metavar="NAME",
        help="profile of the site file; none: only its defaults",
    )
    add("--after", type=nonempty_text, metavar="JOB", help="start after this job has succeeded")


def resolve_nproc_option(value: str | None, device: str) -> int:
    """Number of processes on this machine that `--nproc` gives; 1 without it.

    Args:
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: neither a positive number nor `auto`, or so many that the machine would run out of memory.
    """
    from dl2pa.gpus import resolve_nproc

    if value is None:
        return 1
    if value == "auto":
        return resolve_nproc("auto", device)
    if not value.isdecimal() or int(value) < 1:
        raise UserError("--nproc", value, "must be a positive number or auto", "Give for example --nproc 2.")
    most = _MAX_PER_CORE * usable_cores()
    if len(value.lstrip("0")) > len(str(most)) or int(value) > most:
        message = f"is more than {_MAX_PER_CORE} processes per core of this machine"
        raise UserError("--nproc", value, message, f"Give at most {most}.")
    return int(value)
