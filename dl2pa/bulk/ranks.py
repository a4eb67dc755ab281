"""Embeddings of many images in several processes of this machine; each computes every N-th chunk of the file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dl2pa.local_ranks import run_ranks, work_as_rank
from dl2pa.rundir import MODEL

if TYPE_CHECKING:
    from dl2pa.model.inference import Classifier

_MODULES = (__name__, "dl2pa.bulk.classifier", "dl2pa.bulk.embeddings", "dl2pa.api", "torch._dynamo")


@dataclass(frozen=True)
class EmbedJob:
    """What every process embeds: the model, the images as they were named, and the settings of `dl2pa embed`."""

    model: str
    checkpoint: Literal["final", "latest", "best"]
    images: list[str]
    root: str | None
    is_list: bool
    out: str
    dtype: str
    device: str
    batch: int
    precision: str
    loader: str
    fingerprint: str
    """Of the images; other files than those of the command are refused."""


def embed_on_ranks(job: EmbedJob, classifier: Classifier, nproc: int) -> None:
    """Compute the missing chunks of the file in `nproc` processes.

    Args:
        classifier: the model of the job. If it is from a checkpoint, the processes load a copy, because a training may
            write another checkpoint meanwhile.

    Raises:
        UserError, TrainingFailure: the first error of a process.
        KeyboardInterrupt: a stop signal; the chunks that are complete are kept.
    """
    from dl2pa.model.saved import write_classifier

    with tempfile.TemporaryDirectory(prefix="dl2pa-") as name:
        if job.checkpoint != "final":
            copy = Path(name) / MODEL
            write_classifier(copy, classifier)
            job = replace(job, model=str(copy), checkpoint="final")
        run_ranks(_MODULES, asdict(job), nproc, Path(name))


def main(arguments: Sequence[str]) -> int:
    """Embed as one rank; the argument is the private folder."""
    return work_as_rank(Path(arguments[0]), _embed)


def _embed(fields: dict[str, Any]) -> None:
    import torch

    from dl2pa.api import load
    from dl2pa.bulk.classifier import BulkClassifier
    from dl2pa.bulk.embeddings import EmbeddingFile
    from dl2pa.errors import UserError
    from dl2pa.osutil import usable_cores
    from dl2pa.process import die_with_parent
    from dl2pa.training.distributed import choose_device
    from pipelines.bulk import BulkOptions
    from pipelines.datasets.named import find_images

    die_with_parent()
    job = EmbedJob(**fields)
    rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    threads = max(1, usable_cores() // size)
    torch.set_num_threads(threads)
    table = find_images(job.images, None if job.root is None else Path(job.root), job.is_list).table()
    if table.fingerprint != job.fingerprint:
        raise UserError("image", job.images[0], "the files have changed during the command", "Repeat it.")
    classifier = load(job.model, job.checkpoint, choose_device(job.device, rank))
    bulk = BulkClassifier(classifier, BulkOptions(job.batch, threads, job.loader), job.precision)
    file = EmbeddingFile(Path(job.out), job.dtype)
    # The same list in every process: chunk k belongs to process k mod N.
    own = [number for number in file.missing_chunks(bulk, table) if number % size == rank]
    if own:
        file.compute_share(bulk, table, own, lambda done, total: None)
