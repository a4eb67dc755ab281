"""Evaluation in several processes under torchrun's agent; results and errors are exchanged in a private folder."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, TrainingFailure, UserError
from dl2pa.osutil import write_atomically

if TYPE_CHECKING:
    from dl2pa.training.evaluate import Evaluation

_MODULES = (__name__, "dl2pa.evaluation.measure", "torch._dynamo")
"""Modules that the agent imports before it forks; the first one has `main`."""
_JOB = "job.json"


@dataclass(frozen=True)
class Job:
    """What every process evaluates.

    Attributes:
        run: run directory.
        overrides: of its configuration.
        model: model file.
        sets: name and folder of each set; the validation split without any.
        only_present: see ``with_model_classes``.
    """

    run: str
    overrides: list[str]
    model: str
    sets: list[tuple[str, str]]
    only_present: bool


def evaluate_on_ranks(job: Job, nproc: int) -> list[Evaluation]:
    """Evaluate in `nproc` processes on this machine.

    Raises:
        UserError, TrainingFailure: the first error of a process.
    """
    from launcher.local import run_local
    from launcher.node import Node

    with tempfile.TemporaryDirectory(prefix="dl2pa-") as name:
        folder = Path(name)
        write_atomically(folder / _JOB, json.dumps(asdict(job)))
        code = run_local(nproc, _MODULES, [name], _interrupt, {}, Node(0, 1, "localhost", 0, "local"))
        _raise_first_error(folder)
        if code:
            raise TrainingFailure(f"the processes of the evaluation exited with code {code}")
        return [_load(folder, index) for index in range(max(1, len(job.sets)))]


def _interrupt() -> NoReturn:
    """End the evaluation: there is nothing to save. The processes end with the agent, which this process kills."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str]) -> int:
    """Evaluate as one rank; the argument is the private folder."""
    folder, rank = Path(arguments[0]), int(os.environ["RANK"])
    level = logging.INFO if rank == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    try:
        _evaluate(Job(**json.loads((folder / _JOB).read_text(encoding="utf-8"))), folder)
    except Exception as error:
        user = error.as_dict() if isinstance(error, UserError) else None
        trace = None if isinstance(error, UserError | TrainingFailure) else traceback.format_exc()
        report = {"rank": rank, "time": time.time(), "error": user, "message": str(error), "traceback": trace}
        write_atomically(folder / f"rank-{rank}.error.json", json.dumps(report))
        return EXIT_FAILURE
    return EXIT_DONE


def _evaluate(job: Job, folder: Path) -> None:
    from dl2pa.evaluation.measure import evaluate_all, open_job
    from dl2pa.training.distributed import join_world, leave_world

    config, targets, classifier = open_job(job)
    world = join_world(config)
    results = evaluate_all(config, classifier.to(world.device), targets, world)
    if world.is_main:
        for index, result in enumerate(results):
            _save(folder, index, result)
    leave_world()


def _save(folder: Path, index: int, result: Evaluation) -> None:
    result.predictions.save(folder / f"{index}.npz")
    fields = {key: value for key, value in vars(result).items() if key != "predictions"}
    write_atomically(folder / f"{index}.json", json.dumps(fields))


def _load(folder: Path, index: int) -> Evaluation:
    from dl2pa.training.evaluate import Evaluation, Predictions

    fields: dict[str, Any] = json.loads((folder / f"{index}.json").read_text(encoding="utf-8"))
    return Evaluation(**fields, predictions=Predictions.load(folder / f"{index}.npz"))


def _raise_first_error(folder: Path) -> None:
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("rank-*.error.json")]
    if not reports:
        return
    first = min(reports, key=lambda report: report["time"])
    if first["error"] is not None:
        raise UserError.from_dict(first["error"])
    if first["traceback"]:
        sys.stderr.write(first["traceback"])
    raise TrainingFailure(f"rank {first['rank']}: {first['message']}")
