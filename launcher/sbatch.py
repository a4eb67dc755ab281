"""Options that a submission passes through to sbatch."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import lru_cache

from dl2pa.errors import UserError
from launcher.partition import count_gpus

_KEY = re.compile(r"[a-z][a-z0-9-]{1,40}")
_VALUE = re.compile(r"[\w.,:;@+\[\]*&|()/=%<>!~^ -]{1,500}", re.ASCII)
_SHORT = re.compile(r"^\s+(-\w),?\s+--([a-z0-9-]+)", re.MULTILINE)
_LONG = re.compile(r"^\s+(?:-\w,?\s+)?--([a-z0-9-]+)", re.MULTILINE)

_GPUS = "Use --gpus-per-node [TYPE:]N."
_TASKS = "dl2pa runs one task per node: use --nodes and --gpus-per-node."
_LOGS = "Omit it: the job log is in RUN/slurm."
_QUEUE = "Omit it: dl2pa reads the job number from sbatch."
_ENVIRONMENT = "Use `environment` in the site file."
SET_BY_DL2PA = {
    **{name: f"Use --{name}." for name in ("nodes", "time", "partition", "account", "qos", "constraint")},
    **{name: f"Use --{name}." for name in ("exclude", "mem", "container")},
    **dict.fromkeys(("cpus-per-task", "cpus-per-gpu"), "Use --cpus-per-gpu."),
    **dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "gpu-bind"), _GPUS),
    **dict.fromkeys(("ntasks", "ntasks-per-node", "ntasks-per-core", "ntasks-per-gpu"), _TASKS),
    **dict.fromkeys(("ntasks-per-socket", "tasks-per-node"), _TASKS),
    "dependency": "Use --after JOB.",
    "signal": "Use --stop-before SECONDS.",
    "array": "Use `dl2pa sweep --slurm --parallel N`.",
    **dict.fromkeys(("requeue", "no-requeue"), "Omit it: the job requeues itself until the run is finished."),
    **dict.fromkeys(("output", "error", "input", "open-mode"), _LOGS),
    "job-name": "Omit it: the name is that of the configuration.",
    "comment": "Omit it: `dl2pa jobs` recognizes its jobs by their comment.",
    "chdir": "Omit it, and submit from that folder.",
    **dict.fromkeys(("export", "export-file"), _ENVIRONMENT),
    **dict.fromkeys(("wrap", "wait", "parsable", "test-only", "quiet", "verbose"), _QUEUE),
    **dict.fromkeys(("help", "usage", "version"), "Call sbatch itself."),
    "clusters": "Submit from a host of that cluster.",
}
"""Options of sbatch that dl2pa sets or relies on, with the remedy."""


def parse_options(words: Sequence[str]) -> dict[str, str]:
    """Parse `KEY=VALUE` words, and `KEY` for options without a value; the last one of a key wins.

    Returns:
        Option names without dashes, to values; the value of an option without one is empty.

    Raises:
        UserError: a word without a key, or `KEY=` without a value.
    """
    options: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.strip().removeprefix("--").replace("_", "-")
        if not key or (equals and not value):
            remedy = "Write KEY=VALUE, for example reservation=NAME, or KEY for an option without a value."
            raise UserError("--sbatch", word, "is not an option of sbatch", remedy)
        options.pop(key, None)
        options[key] = value
    return options


def as_words(options: Mapping[str, str]) -> tuple[str, ...]:
    """Inverse of `parse_options`."""
    return tuple(f"{key}={value}" if value else key for key, value in options.items())


def check_options(words: Sequence[str]) -> None:
    """Refuse options that dl2pa sets itself, that sbatch does not know, and unsafe values.

    Options are compared with `sbatch --help`, and with sbatch itself if the help does not list them. Without sbatch
    only its own errors remain.

    Raises:
        UserError: naming the first invalid option.
    """
    for key, value in parse_options(words).items():
        _check_option(key, value)


def _check_option(key: str, value: str) -> None:
    word = f"{key}={value}" if value else key
    long = {
        short.removeprefix("-"): name for short, name in _SHORT.findall(help_text(shutil.which("sbatch")))
    }
    name = long.get(key, key)
    if name in SET_BY_DL2PA:
        raise UserError("--sbatch", word, "is set by dl2pa", SET_BY_DL2PA[name])
    if name != key:
        raise UserError("--sbatch", word, "is a short option", f"Use {name}.")
    if not _KEY.fullmatch(key) or not _is_known(key):
        near = difflib.get_close_matches(key, sorted(_known_options()), n=1)
        remedy = f"Did you mean {near[0]}?" if near else "See `sbatch --help`."
        raise UserError("--sbatch", word, "is not an option of this cluster's sbatch", remedy)
    if value and not _VALUE.fullmatch(value):
        remedy = "Use letters, digits, spaces and . _ , : ; @ + - [ ] * & | ( ) / = % < > ! ~ ^ only."
        raise UserError("--sbatch", word, "contains characters that a script does not preserve", remedy)


def _known_options() -> set[str]:
    """Options that `sbatch --help` lists and dl2pa does not set; empty if sbatch does not answer."""
    return {*_LONG.findall(help_text(shutil.which("sbatch")))} - SET_BY_DL2PA.keys()


def _is_known(key: str) -> bool:
    """Whether sbatch accepts the option; True if its help lists no options."""
    known = _known_options()
    if not known or key in known:
        return True
    # sbatch reads options in order: it reports an unknown one before it prints its version.
    for word in (f"--{key}=1", f"--{key}"):
        done = _run("sbatch", word, "--version")
        if done is None or "unrecognized option" not in done.stderr:
            return True
    return False


@lru_cache(maxsize=4)
def help_text(sbatch: str | None) -> str:
    """Output of `sbatch --help`; empty if there is none."""
    done = None if sbatch is None else _run(sbatch, "--help")
    return "" if done is None else done.stdout


def _run(*command: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def gpus_of_gres(options: Mapping[str, str]) -> int | None:
    """GPUs per node that `gres` requests; None if it requests none."""
    value = options.get("gres", "").replace("gres/", "").replace("gres:", "")
    return count_gpus(value) if re.search(r"(?:^|,)gpu(?![\w-])", value) else None


def without_gpus(options: Mapping[str, str]) -> dict[str, str]:
    """Return the options without the GPUs in `gres`."""
    parts = [part for part in options.get("gres", "").split(",") if gpus_of_gres({"gres": part}) is None]
    rest = {key: value for key, value in options.items() if key != "gres"}
    return {**rest, "gres": ",".join(parts)} if any(parts) else rest
