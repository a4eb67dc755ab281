"""End of a finished run's output: best epoch, summary page and the next commands."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dl2pa.container import in_container
from dl2pa.rundir import RunDirectory


def next_steps(run: RunDirectory, result: Mapping[str, Any]) -> str:
    """Text of the best epoch, the summary page if there is one, and commands that use the run.

    Args:
        result: content of `result.json`.
    """
    lines = [f"best:     {_best(result)}"]
    if run.summary_page.is_file():
        lines.append(f"summary:  {run.summary_page}")
    return "\n".join([*lines, "next:", *_commands(run, result)])


def _best(result: Mapping[str, Any]) -> str:
    best, last = result["top1_best"], result["top1_last"]
    epoch = (
        f"epoch {result['epoch_best']}, " if "epoch_best" in result else ""
    )  # runs of older versions lack it
    return f"{epoch}top-1 {best:.2f} %" + (f" (last: {last:.2f} %)" if best > last else "")


def _commands(run: RunDirectory, result: Mapping[str, Any]) -> list[str]:
    folder, runs = shlex.quote(str(run.root)), run.root.parent
    commands = {
        f"{_program()} predict {folder} IMAGE": "classify images",
        f"{_program()} evaluate {folder}": "accuracy and calibration on the validation set",
        f"{_program()} export {folder}": "self-contained model folder; --onnx, --mlflow",
    }
    if result.get("mlflow_run_id") and (runs / "mlflow.db").exists():
        ui = f"ui --runs {shlex.quote(str(runs))}"
        if in_container():
            ui = f"{_program('-p 5000:5000 ')} {ui} --host 0.0.0.0 --allow-others localhost"
        else:
            ui = f"{_program()} {ui}"
        commands[ui] = "see it in MLflow"
    width = max(map(len, commands))
    return [f"  {command:<{width}}  # {text}" for command, text in commands.items()]


def _program(container_options: str = "") -> str:
    """How the user starts `dl2pa`, which may not be on the path."""
    if in_container():
        return f"docker run {container_options}… IMAGE"
    installed = Path(sys.executable).parent / "dl2pa"
    return "dl2pa" if shutil.which("dl2pa") == str(installed) else shlex.quote(str(installed))
