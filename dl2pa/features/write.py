"""Write a feature data set: load the frozen network, compute the missing chunks, and join them."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import nn

from dl2pa.config import Config
from dl2pa.errors import UserError
from dl2pa.features.extract import Chunks, Task, compute, part_file, read_part
from dl2pa.features.join import Block, join
from dl2pa.model.frozen import model_description
from dl2pa.model.init import load_initial_weights
from dl2pa.model.model import build_configured_embedder
from dl2pa.model.saved import preprocessing_of
from dl2pa.osutil import LockResult, replacing, start_thread, try_lock, usable_cores, write_json
from dl2pa.training.data import DataSplits
from dl2pa.training.distributed import choose_device
from pipelines.dataset import num_samples
from pipelines.datasets.arrays import Split
from pipelines.datasets.features import FORMAT, SPLITS, FeatureFolder
from pipelines.encoded import FaultLimits, too_many
from pipelines.parallel import in_parallel

log = logging.getLogger(__name__)

_PROGRESS_S = 10.0
_DATA_KEYS = ("dataset", "image_size", "eval_resize", "interpolation", "mean", "std")


@dataclass(frozen=True)
class FeatureOptions:
    """Options of `dl2pa features`.

    Attributes:
        dtype: float16 or float32.
        pca: number of principal components; None keeps the features of the network.
        nproc: number of processes, one per GPU, or on the CPU.
    """

    dtype: str = "float16"
    pca: int | None = None
    nproc: int = 1


def write_features(config: Config, data: DataSplits, out: Path, options: FeatureOptions) -> dict[str, Any]:
    """Write the features of both splits to the folder `out`, or continue an earlier pass; returns the record.

    Args:
        data: the images.

    Raises:
        UserError: invalid weights or options, unreadable images, or a folder with other features.
    """
    folder = FeatureFolder(out)
    _check_place(folder)
    network, width, init = _frozen_network(config)
    _check_pca(options.pca, width, num_samples(data.train))
    content = _serialize(network)
    del network
    described = {
        "model": model_description(config.model),
        "preprocessing": preprocessing_of(config),
        "sha256": hashlib.sha256(content).hexdigest(),
        "dim": options.pca or width,
        "pca": None,
        "digest": None,
    }
    identity = _identity(config, data, options, described)
    folder.root.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        earlier = folder.read_record()
        if earlier is not None:
            _check_identity(folder, earlier["identity"], identity)
            if earlier["complete"]:
                log.info("%s is complete", out)
                return earlier
        record = {
            **{"format": FORMAT, "complete": False, "identity": identity, "classes": list(data.classes)},
            **{"dim": options.pca or width, "dtype": options.dtype, "network": described, "init": init},
            **{"splits": {}, "torch": torch.__version__},
        }
        folder.parts.mkdir(exist_ok=True)
        folder.stop.unlink(missing_ok=True)
        with replacing(folder.backbone, len(content)) as temporary:
            temporary.write_bytes(content)
        write_json(folder.record, record, indent=1)
        record |= _compute(config, data, folder, described, options)
        layouts = _layouts(config, data)
        join(folder, lambda split: _blocks(folder, split, layouts[split]), record, options.pca)
        _count_skipped(config, data, record)
        write_json(folder.record, {**record, "complete": True}, indent=1)
        shutil.rmtree(folder.parts, ignore_errors=True)
    return {**record, "complete": True}


def _frozen_network(config: Config) -> tuple[nn.Module, int, dict[str, Any] | None]:
    """The network with its initial weights, the dimension of its features, and the record of the weights."""
    linear = config.model_copy(update={"model": config.model.model_copy(update={"head": "linear"})})
    torch.manual_seed(config.train.seed)
    embedder = build_configured_embedder(linear)
    if config.model.init is None:
        log.warning("the features are those of a network with random weights; set model.init")
    init = None if config.model.init is None else load_initial_weights(linear, embedder).as_dict()
    assert isinstance(embedder.head, nn.Linear)
    return embedder.backbone, embedder.head.in_features, init


def _serialize(network: nn.Module) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})


def _check_pca(count: int | None, width: int, images: int) -> None:
    limit = min(width, images)
    if count is not None and not 1 <= count <= limit:
        message = f"must be from 1 to {limit}: {images:,} training images have {width} features each"
        raise UserError("--pca", count, message, f"Give at most {limit}.")


def _check_place(folder: FeatureFolder) -> None:
    """Refuse a folder with other files."""
    if folder.root.is_dir() and not folder.record.exists() and any(folder.root.iterdir()):
        others = [path.name for path in folder.root.iterdir() if path.name != _lock_file(folder).name]
        if others:
            message = f"contains other files, for example {sorted(others)[0]}"
            raise UserError("--out", str(folder.root), message, "Give a new folder.")


def _identity(
    config: Config, data: DataSplits, options: FeatureOptions, network: dict[str, Any]
) -> dict[str, Any]:
    """Everything that the features depend on, by the name of the option or key that sets it."""
    tree = config.data.model_dump(mode="json")
    return {
        "model.init": network["sha256"],
        "model.backbone": network["model"]["backbone"],
        **{f"data.{key}": tree[key] for key in _DATA_KEYS},
        "data.loader": config.loader,
        "data.root": data.fingerprint,
        "train.precision": config.train.precision,
        "train.eval_batch_size": _batch(config),
        "--dtype": options.dtype,
        "--pca": options.pca,
    }


def _check_identity(folder: FeatureFolder, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            was = before.get(key)
            message = f"contains other features: {key} is {value!r} now and was {was!r}"
            remedy = "Give another --out, or remove this folder."
            raise UserError("--out", str(folder.root), message, remedy)


def _lock_file(folder: FeatureFolder) -> Path:
    return folder.root / ".lock"


@contextmanager
def _locked(folder: FeatureFolder) -> Generator[None]:
    """Context in which this process alone writes to the folder, where the file system has locks."""
    descriptor = os.open(_lock_file(folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if try_lock(descriptor) is LockResult.HELD:
            message = "is being written by another process"
            raise UserError("--out", str(folder.root), message, "Wait for it, or stop it.")
        yield
    finally:
        os.close(descriptor)


def _batch(config: Config) -> int:
    return config.train.eval_batch_size or config.train.batch_size


def _layouts(config: Config, data: DataSplits) -> dict[Split, Chunks]:
    splits = zip(SPLITS, (data.train, data.val), strict=True)
    return {split: Chunks(num_samples(dataset), _batch(config)) for split, dataset in splits}


def _compute(
    config: Config,
    data: DataSplits,
    folder: FeatureFolder,
    network: dict[str, Any],
    options: FeatureOptions,
) -> dict[str, float]:
    """Compute the missing chunks; return the seconds and the images per second."""
    began = time.monotonic()
    missing: dict[Split, list[int]] = {}
    left = total = 0
    for split, layout in _layouts(config, data).items():
        missing[split] = [i for i in range(len(layout)) if not part_file(folder, split, i).is_file()]
        left += sum(len(layout.samples(i)) for i in missing[split])
        total += layout.count
    log.info("%s of %s images to compute, %d process(es)", f"{left:,}", f"{total:,}", options.nproc)
    nproc = max(1, min(options.nproc, sum(map(len, missing.values()))))
    threads = config.launch.threads or max(1, usable_cores() // nproc)
    tasks = [
        Task(
            config,
            folder,
            network,
            _batch(config),
            {split: tuple(chunks[rank::nproc]) for split, chunks in missing.items()},
            str(choose_device(config.launch.device, rank)),
            threads,
        )
        for rank in range(nproc)
    ]
    with _reporting(folder, left, sum(map(len, missing.values()))):
        for _ in in_parallel(compute, tasks if left else [], nproc):
            pass
    seconds = time.monotonic() - began
    return {"seconds": seconds, "images_per_second": left / seconds}


@contextmanager
def _reporting(folder: FeatureFolder, images: int, chunks: int) -> Generator[None]:
    """Log the progress, counted in files, while the context is active."""
    began, done = time.monotonic(), Event()
    before = sum(1 for _ in folder.parts.glob("*.npz"))

    def report() -> None:
        while not done.wait(_PROGRESS_S):
            ready = sum(1 for _ in folder.parts.glob("[!.]*.npz")) - before
            if ready:
                seconds = time.monotonic() - began
                speed = images * ready / chunks / seconds
                text = "%.0f %% of the images, %.0f images/s, %.0f s left"
                log.info(text, 100 * ready / chunks, speed, seconds / ready * (chunks - ready))

    thread = start_thread(report, "dl2pa-features")
    try:
        yield
    finally:
        done.set()
        thread.join()


def _blocks(folder: FeatureFolder, split: Split, layout: Chunks) -> Iterator[Block]:
    for chunk in range(len(layout)):
        part = read_part(part_file(folder, split, chunk))
        yield part.features, part.labels


def _count_skipped(config: Config, data: DataSplits, record: dict[str, Any]) -> None:
    """Record the unreadable images, and refuse more than allowed; training images have the limit of training."""
    for split, dataset in zip(SPLITS, (data.train, data.val), strict=True):
        known, limits = record["splits"][split], config.data
        known["skipped"] = skipped = num_samples(dataset) - known["images"]
        train = split == "train"
        limit = FaultLimits(limits.max_bad_fraction, limits.max_bad_val_fraction).allowed(
            num_samples(dataset), train
        )
        if skipped > limit:
            raise too_many(train, skipped, f"exceed the {limit} allowed")
        if skipped:
            log.warning("%d unreadable image(s) of the split %s were left out", skipped, split)
