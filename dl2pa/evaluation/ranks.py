"""Evaluation in several processes of this machine, which write their results to a private folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dl2pa.local_ranks import run_ranks, work_as_rank
from dl2pa.osutil import write_atomically

if TYPE_CHECKING:
    from dl2pa.config import Config
    from dl2pa.evaluation.layers import Layers
    from dl2pa.evaluation.sources import Source
    from dl2pa.training.distributed import World
    from dl2pa.training.evaluate import Evaluation

_MODULES = (__name__, "dl2pa.evaluation.measure", "dl2pa.evaluation.sources", "torch._dynamo")


@dataclass(frozen=True)
class Job:
    """What every process evaluates.

    Attributes:
        run: run directory.
        overrides: of its configuration.
        model: model file.
        sets: name and folder of each set; the validation split without any.
        only_present: see ``with_model_classes``.
        sources: images whose layers are computed, as dictionaries of ``Source``; with any, nothing is classified.
        with_backbone: whether the layer before the embedding is computed too.
    """

    run: str
    overrides: list[str]
    model: str
    sets: list[tuple[str, str]]
    only_present: bool
    sources: Sequence[dict[str, Any]] = ()
    with_backbone: bool = False


def evaluate_on_ranks(job: Job, nproc: int) -> list[Evaluation]:
    """Evaluate in `nproc` processes on this machine.

    Raises:
        UserError, TrainingFailure: the first error of a process.
    """
    with tempfile.TemporaryDirectory(prefix="dl2pa-") as name:
        folder = Path(name)
        run_ranks(_MODULES, asdict(job), nproc, folder)
        return [_load(folder, index) for index in range(max(1, len(job.sets)))]


def layers_on_ranks(job: Job, sources: Sequence[Source], with_backbone: bool, nproc: int) -> Iterator[Layers]:
    """Compute the layers of each source in `nproc` processes on this machine.

    A process computes whole batches of those that one process would compute, so the results are the same.

    Raises:
        UserError, TrainingFailure: the first error of a process; more unreadable images than allowed.
    """
    from dl2pa.evaluation.layers import Layers, join_layers

    with tempfile.TemporaryDirectory(prefix="dl2pa-") as name:
        folder = Path(name)
        job = replace(job, sources=[asdict(source) for source in sources], with_backbone=with_backbone)
        run_ranks(_MODULES, asdict(job), nproc, folder)
        for index, source in enumerate(sources):
            parts = [Layers.load(_part(folder, index, rank)) for rank in range(nproc)]
            yield join_layers(parts, source.root, of_training=source.of_training)


def main(arguments: Sequence[str]) -> int:
    """Evaluate as one rank; the argument is the private folder."""
    folder = Path(arguments[0])

    def work(job: dict[str, Any]) -> None:
        (_compute if job["sources"] else _evaluate)(Job(**job), folder)

    return work_as_rank(folder, work)


def _evaluate(job: Job, folder: Path) -> None:
    from dl2pa.evaluation.measure import evaluate_all, open_job
    from dl2pa.training.distributed import leave_world

    config, targets, classifier = open_job(job)
    world = _join(config)
    results = evaluate_all(config, classifier.to(world.device), targets, world)
    if world.is_main:
        for index, result in enumerate(results):
            _save(folder, index, result)
    leave_world()


def _compute(job: Job, folder: Path) -> None:
    from dl2pa.evaluation.sources import Source, compute_sources
    from dl2pa.recorded_run import load_run_config
    from dl2pa.training.distributed import leave_world

    config = load_run_config(Path(job.run), job.overrides)
    sources = [Source(**source) for source in job.sources]
    opened = [(source, source.open(config)) for source in sources]
    world = _join(config)
    layers = compute_sources(config, Path(job.model), opened, world, job.with_backbone)
    for index, part in enumerate(layers):
        part.save(_part(folder, index, world.rank))
    leave_world()


def _join(config: Config) -> World:
    """Join the processes. `train.sync_bn`, which needs GPUs, has no effect on a trained model."""
    from dl2pa.training.distributed import join_world

    train = config.train.model_copy(update={"sync_bn": False})
    return join_world(config.model_copy(update={"train": train}))


def _part(folder: Path, index: int, rank: int) -> Path:
    return folder / f"layers-{index}-{rank}.npz"


def _save(folder: Path, index: int, result: Evaluation) -> None:
    result.predictions.save(folder / f"{index}.npz")
    fields = {key: value for key, value in vars(result).items() if key != "predictions"}
    write_atomically(folder / f"{index}.json", json.dumps(fields))


def _load(folder: Path, index: int) -> Evaluation:
    from dl2pa.training.evaluate import Evaluation, Predictions

    fields: dict[str, Any] = json.loads((folder / f"{index}.json").read_text(encoding="utf-8"))
    return Evaluation(**fields, predictions=Predictions.load(folder / f"{index}.npz"))
