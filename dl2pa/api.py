"""Python API: `dl2pa.train` runs the program of the command `dl2pa train`, `dl2pa.load` loads what it trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NoReturn

from dl2pa import envvars
from dl2pa.config.yaml_core import dump_yaml, value_text
from dl2pa.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER_ERROR, TrainingFailure, UserError
from dl2pa.osutil import start_thread
from dl2pa.process import environment_without_ranks, private_command, private_input
from dl2pa.recorded_run import check_weights, load_run_config
from dl2pa.rundir import RunDirectory, find_model_file
from dl2pa.runplan import RunSpec, plan_runs
from dl2pa.tracking.sync_state import last_server, load_sync_state

if TYPE_CHECKING:
    import torch

    from dl2pa.model.inference import Classifier

_CHECKPOINTS = ("final", "latest", "best")
_MAX_INTERRUPTS = 3
"""Number of interrupts after which the run ends without saving."""
_DRAIN_S = 10
"""Seconds to wait for the end of the output of a process that has ended."""


@dataclass(frozen=True)
class RunResult:
    """Outcome of `train`.

    Attributes:
        run_dir: absolute path of the run directory.
        state: `finished`, or `stopped` on request of somebody else, with a checkpoint; the same call resumes.
        last: last validation: `epoch` (1 is the first) and `top1` in percent; of a finished run also `top5`, `ece`,
            `ece_calibrated`, `nll`, `nll_calibrated` and the `temperature` that calibrates its probabilities, and, with
            long-tailed data, `top1_head`, `top1_medium` and `top1_tail`. Empty before the first validation.
        best: `epoch` and `top1` of the validation with the highest accuracy.
        mlflow_run_id: MLflow's id of the run; None if it is not tracked or no server has answered yet.
        elapsed_s: seconds that this call took.
    """

    run_dir: Path
    state: Literal["finished", "stopped"]
    last: dict[str, float]
    best: dict[str, float]
    mlflow_run_id: str | None
    elapsed_s: float


def train(
    config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    run_dir: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> RunResult:
    """Train a configuration to its end, in new processes; the same call on the same run directory resumes.

    `KeyboardInterrupt` in this function, as by Ctrl-C, stops the run with a checkpoint and is then raised again.

    Args:
        config: configuration file, or its content as nested dicts.
        run_dir: run directory; default: `runs/<config>-<fingerprint>`, where a dict has the name `config`.
        quiet: do not copy the run's log to `sys.stderr`.
        overrides: sections, as in `train={"epochs": 5}`, or keys, as in `**{"train.epochs": 5}`.

    Raises:
        UserError: invalid input.
        TrainingFailure: the run failed; the message gives the reason and the folder of the logs.
    """
    _check_type("quiet", quiet, bool, "Give True or False.")
    words = tuple(f"{key}={value_text(_plain(key, value))}" for key, value in overrides.items())
    began = time.monotonic()
    with _config_file(config) as file:
        folder = None if run_dir is None else _path("run_dir", run_dir)
        (plan,) = plan_runs([RunSpec(file, words)], folder)
        arguments = ["train", str(file), *words, "--run-dir", str(plan.run_dir), "--json"]
        with private_input(arguments) as standard_input:
            code, output = _run(private_command(arguments), quiet, standard_input)
    if code not in (EXIT_DONE, EXIT_STOPPED):
        _raise_error(code, output, plan.directory)
    return _result(plan.directory, code == EXIT_DONE, time.monotonic() - began)


def load(
    run: str | os.PathLike[str],
    checkpoint: Literal["final", "latest", "best"] = "final",
    device: str | torch.device = "auto",
) -> Classifier:
    """Load the model of a run.

    Args:
        run: run directory; with the checkpoint `final` also an export or a model file.
        checkpoint: `final` model of a finished run, or the `latest` or `best` checkpoint.
        device: `auto` is a GPU if there is one.

    Raises:
        UserError: there is no such model, it is damaged, or there is no such device.
    """
    path = _path("run", run)
    if checkpoint not in _CHECKPOINTS:
        raise UserError("checkpoint", checkpoint, "is unknown", f"Use one of {', '.join(_CHECKPOINTS)}.")
    if checkpoint == "final":
        find_model_file(path)
        from dl2pa.model.compose import load_image_classifier

        return load_image_classifier(path).to(_device(device))
    config = load_run_config(path, ())
    check_weights(path, checkpoint)
    import torch

    from dl2pa.training.weights import load_weights

    with torch.random.fork_rng(devices=[]):
        classifier = load_weights(path, config, checkpoint)
    if classifier.takes_features:
        from dl2pa.model.compose import join_frozen

        classifier = join_frozen(classifier, config)
    return classifier.to(_device(device))


def _path(field: str, value: Any, others: str = "") -> Path:
    """Path of an argument, with `~` expanded.

    Args:
        others: end of the remedy: what the argument can also be.
    """
    _check_type(field, value, str | os.PathLike, f"Give the path as a text or pathlib.Path{others}.")
    name = os.fspath(value)
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError(field, value, "is not the path of a file", "Give a text without zero bytes.")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # the home of an unknown user
        raise UserError(field, name, f"cannot be expanded ({error})", "Give the whole path.") from None


def _check_type(field: str, value: Any, expected: Any, remedy: str) -> None:
    """Check the type of an argument.

    Raises:
        UserError: another type.
    """
    if not isinstance(value, expected):
        raise UserError(field, value, f"cannot be a {type(value).__name__}", remedy)


def _device(name: str | torch.device) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    remedy = "Use auto, cpu, cuda or cuda:N."
    try:
        _check_type("device", name, str | torch.device, remedy)  # torch also accepts numbers
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UserError("device", name, f"is not a device ({error})", remedy) from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError("device", str(name), f"torch finds {count} GPU(s)", remedy)
    return device


def _plain(field: str, value: Any) -> Any:
    """Replace mappings, sequences, paths and NumPy scalars by dicts, lists, texts and numbers.

    Raises:
        UserError: a value that a configuration cannot contain.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{field}.{key}", part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(field, part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value) in (str, int, float, bool, type(None)):
        return value
    if getattr(value, "shape", None) == ():
        return value.item()
    message = f"cannot be a {type(value).__name__}"
    raise UserError(field, value, message, "Give a number, text, path, list, dict or None.")


@contextmanager
def _config_file(config: str | os.PathLike[str] | Mapping[str, Any]) -> Generator[Path]:
    """Yield the configuration file; a dict is written to a private temporary one."""
    if not isinstance(config, Mapping):
        yield _path("config", config, ", or the configuration as a dict")
        return
    tree = {key: _plain(key, value) for key, value in config.items()}
    if "base" in tree:
        bases = tree["base"] if isinstance(tree["base"], list) else [tree["base"]]
        tree["base"] = [_absolute(base) for base in bases]
    with tempfile.TemporaryDirectory(prefix="dl2pa-") as folder:
        file = Path(folder, "config.yaml")
        file.write_text(dump_yaml(tree), encoding="utf-8")
        yield file


def _absolute(base: Any) -> Any:
    """Path relative to the current folder, not to the temporary one; `~` and variables are expanded later."""
    return str(Path(base).absolute()) if isinstance(base, str) and base[:1] not in ("~", "$") else base


def _run(command: Sequence[str], quiet: bool, standard_input: int = subprocess.DEVNULL) -> tuple[int, str]:
    """Run `dl2pa train` in a process that ends with this one; return its exit code and standard output.

    Raises:
        KeyboardInterrupt: after the process has ended.
    """
    process = subprocess.Popen(
        command,
        stdin=standard_input,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**environment_without_ranks(), envvars.AGENT_PID: str(os.getpid())},
        process_group=0,  # Ctrl-C reaches only this process, which forwards it once
    )
    output: list[str] = []
    assert process.stdout is not None and process.stderr is not None
    readers = [_read(process.stdout, output.append), _read(process.stderr, _discard if quiet else _show)]
    try:
        code, interrupt = _wait(process)
    finally:
        process.kill()  # does nothing to a process that has ended
        process.wait()
        for reader in readers:
            reader.join(_DRAIN_S)
    if interrupt is not None:
        raise interrupt
    return code, "".join(output)


def _wait(process: subprocess.Popen[str]) -> tuple[int, KeyboardInterrupt | None]:
    """Wait for the end. An interrupt asks the run to stop; the last of ``_MAX_INTERRUPTS`` kills it."""
    interrupts = 0
    first: KeyboardInterrupt | None = None
    while True:
        try:
            return process.wait(), first
        except KeyboardInterrupt as interrupt:
            first = first or interrupt
            interrupts += 1
            if interrupts == 1:
                process.terminate()
            elif interrupts >= _MAX_INTERRUPTS:
                process.kill()


def _read(stream: IO[str], use: Callable[[str], object]) -> threading.Thread:
    def read() -> None:
        with stream:
            for line in stream:
                use(line)

    return start_thread(read, "dl2pa-output")


def _show(line: str) -> None:
    sys.stderr.write(line)
    sys.stderr.flush()


def _discard(line: str) -> None:
    return None


def _raise_error(code: int, output: str, run: RunDirectory) -> NoReturn:
    """Raise the error that `dl2pa train --json` printed in its last line."""
    error: dict[str, Any] = {}
    with suppress(ValueError, LookupError, TypeError):
        error = json.loads(output.splitlines()[-1])["error"]
    if code == EXIT_USER_ERROR and error:
        raise UserError.from_dict(error)
    reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    raise TrainingFailure(f"{error.get('message') or reason}; see {run.logs}")


def _result(run: RunDirectory, finished: bool, elapsed_s: float) -> RunResult:
    status, result = run.status(), run.read_result() if finished else {}
    last = _renamed(status, {"epoch_last": "epoch", "top1": "top1"})
    if finished:
        last = {"epoch": result["epochs"], **last, **_renamed(result, _LAST)}
    best = _renamed(result or status, {"epoch_best": "epoch", "top1_best": "top1"})
    server = last_server(run.root)
    run_id = result.get("mlflow_run_id") or (server and load_sync_state(run.root, server).run_id) or None
    return RunResult(run.root, "finished" if finished else "stopped", last, best, run_id, elapsed_s)


_LAST = {
    **{f"{name}_last": name for name in ("top1", "top5", "ece")},
    **{name: name for name in ("ece_calibrated", "nll", "nll_calibrated", "temperature")},
    **{name: name for name in ("top1_head", "top1_medium", "top1_tail")},
}
"""Entries of `result.json` and their names in `RunResult.last`."""


def _renamed(record: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {new: record[old] for old, new in names.items() if record.get(old) is not None}
