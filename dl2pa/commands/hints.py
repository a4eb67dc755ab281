"""Remedies for misspelled commands and options, and for options that are configuration keys here."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Collection, Sequence

from dl2pa.errors import UserError, UserErrors

FIELD = "command line"

_COMMANDS = {
    **dict.fromkeys(("fit", "run", "start"), "train"),
    **dict.fromkeys(("eval", "test", "validate"), "evaluate"),
    **dict.fromkeys(("sbatch", "queue", "launch"), "submit"),
    **dict.fromkeys(("status", "list", "ps"), "jobs"),
    **dict.fromkeys(("monitor", "top"), "watch"),
    **dict.fromkeys(("stop", "kill"), "cancel"),
    **dict.fromkeys(("infer", "classify"), "predict"),
}
"""Names of commands in other programs."""

_CONFIG_OPTIONS = ("config", "cfg", "c", "config-file", "conf")
_PROCESS_OPTIONS = (
    *("gpus", "num-gpus", "ngpus", "n-gpus", "devices", "num-devices", "nproc", "nproc-per-node"),
    *("num-processes", "world-size", "gpus-per-node"),
)
_FOLDER_OPTIONS = ("output-dir", "out-dir", "output", "out", "save-dir", "work-dir", "log-dir", "logdir")
_RESUME_OPTIONS = ("resume", "auto-resume", "resume-from", "continue")
_SETTINGS = {
    **{name: f"train.precision={name}" for name in ("bf16", "fp16", "fp32")},
    "amp": "train.precision=bf16",
    **dict.fromkeys(("gpu", "cuda"), "launch.device=cuda"),
    "cpu": "launch.device=cpu",
}
"""Names of switches in other programs to the override."""
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
_INVALID_CHOICE = re.compile(r"invalid choice: '(?P<value>.*)' \(choose from (?P<choices>.*)\)")


def check_command(words: Sequence[str], commands: Collection[str]) -> None:
    """Refuse an unknown command with the nearest one.

    Raises:
        UserError: the first word is neither a command nor an option.
    """
    word = words[0] if words else "-"
    if word.startswith("-") or word in commands:
        return
    near = [_COMMANDS[word]] if word in _COMMANDS else difflib.get_close_matches(word, commands, n=1)
    remedy = f"Did you mean {near[0]}?" if near else f"Use one of {', '.join(commands)}."
    if word.endswith((".yaml", ".yml")):
        remedy = f"Did you mean train {shlex.quote(word)}?"
    raise UserError(FIELD, word, "unknown command", f"{remedy} See `dl2pa --help`.")


def choice_hint(message: str) -> str:
    """Return a remedy for argparse's message of an invalid choice; empty for other messages."""
    match = _INVALID_CHOICE.search(message)
    choices = [] if match is None else re.findall(r"[\w.:+-]+", match["choices"])
    near = [] if match is None else difflib.get_close_matches(match["value"], choices, n=1)
    return f"Did you mean {near[0]}? " if near else ""


def check_options(words: Sequence[str], options: Collection[str], takes: Collection[str]) -> None:
    """Refuse unknown options, each with the option or override that it probably stands for.

    Args:
        words: the command, then its arguments.
        options: options of the command.
        takes: names of its positional arguments; `overrides` if it takes `key=value`.

    Raises:
        UserError: all unknown options.
    """
    problems: list[UserError] = []
    for position, word in enumerate(words):
        if word == "--":
            break
        option, equals, value = word.partition("=")
        if not re.match(r"--?[A-Za-z]", word) or option in options:
            continue
        if option[:2] in options and not word.startswith("--"):  # a short option with its value, such as -n4
            continue
        following = words[position + 1] if position + 1 < len(words) else ""
        if not equals and following and not following.startswith("-") and not _OVERRIDE.match(following):
            value = following
        remedy = _remedy(option.lstrip("-"), value, words[0], options, takes)
        problems.append(UserError(FIELD, option, "unknown option", f"{remedy}See `dl2pa {words[0]} --help`."))
    if problems:
        raise problems[0] if len(problems) == 1 else UserErrors(problems)


def _remedy(name: str, value: str, command: str, options: Collection[str], takes: Collection[str]) -> str:
    """Return the first part of the remedy for an unknown option, with a space at the end; empty if none is known."""
    name, quoted = name.casefold().replace("_", "-"), shlex.quote(value) if value else "VALUE"
    if name in _SETTINGS and "overrides" in takes:
        return f"Use {_SETTINGS[name]}. "
    if name in _CONFIG_OPTIONS and ("config" in takes or ("overrides" in takes and "run" not in takes)):
        return f"Give the file without an option: dl2pa {command} {quoted if value else 'FILE'}. "
    if name in _PROCESS_OPTIONS and (used := _process_option(quoted, options, takes)):
        return f"Use {used}. "
    if name in _FOLDER_OPTIONS and "--run-dir" in options:
        return f"Use --run-dir {quoted if value else 'DIR'}. "
    if name in _RESUME_OPTIONS and "--run-dir" in options:
        return "The same command resumes the run in its --run-dir. "
    own = difflib.get_close_matches(f"--{name}", sorted(options), n=1, cutoff=0.7)
    keys = _keys_for(name) if "overrides" in takes else []
    if own and (not keys or _likeness(name, own[0][2:]) >= _likeness(name, keys[0].rpartition(".")[2])):
        return f"Did you mean {own[0]}? "
    if not keys:
        return ""
    if not value:
        value = "false" if name.startswith("no-") else "true" if _is_switch(keys[0]) else "VALUE"
    return f"Use {' or '.join(shlex.quote(f'{key}={value}') for key in keys)}. "


def _process_option(quoted: str, options: Collection[str], takes: Collection[str]) -> str:
    """Return the option for the number of GPUs or processes of a command."""
    if "--slurm" in options:
        return f"launch.nproc={quoted}, or --slurm --gpus-per-node {quoted}"
    for option in ("--nproc", "--gpus-per-node", "--devices"):
        if option in options:
            return f"{option} {quoted}"
    return f"launch.nproc={quoted}" if "overrides" in takes else ""


def _keys_for(name: str) -> list[str]:
    """Return the configuration keys that an option of another program stands for, best first."""
    from dl2pa.config.explain import keys_of
    from dl2pa.config.schema import Config
    from dl2pa.config.schema_errors import OTHER_NAMES, similar_keys

    names = [key.name for key in keys_of(Config)]
    key = name.removeprefix("no-").replace("-", "_")
    key = OTHER_NAMES.get(key, key)
    if key in names:
        return [key]
    section, _, last = key.rpartition(".")
    same = [known for known in similar_keys(last, names, 1.0) if not section or known.startswith(section)]
    return same or similar_keys(last, names, 0.75)


def _is_switch(key: str) -> bool:
    from dl2pa.config.explain import explain

    return True in explain(key)[0].allowed


def _likeness(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first.replace("_", "-"), second.replace("_", "-")).ratio()
