"""`dl2pa features`: compute the features of a frozen network once, for training on them in seconds."""

from __future__ import annotations

import argparse
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from dl2pa.commands.options import add_config, check_output_folder, nonempty_path
from dl2pa.commands.output import note, say
from dl2pa.errors import EXIT_DONE, EXIT_STOPPED, UserError

if TYPE_CHECKING:
    from dl2pa.config import Config
    from dl2pa.training.data import DataSplits

_DTYPE = "float16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add = parser.add_argument
    add(
        "--out",
        type=nonempty_path,
        required=True,
        metavar="DIR",
        help="folder to write: data.root of the training",
    )
    add("--pca", type=int, metavar="N", help="keep the N principal components of the training features")
    add("--clusters", type=int, metavar="N", help="of existing features: split each class into N clusters")
    add("--dtype", choices=("float16", "float32"), help="stored numbers (default: float16)")
    add("--nproc", type=int, metavar="N", help="processes on this machine (default: launch.nproc)")


def run(args: argparse.Namespace) -> int:
    from dl2pa.config import load_config
    from dl2pa.gpus import resolve_nproc
    from dl2pa.runplan import follow_weights
    from dl2pa.specs import dataset_spec

    config = follow_weights(load_config(args.config, args.overrides))
    nproc = resolve_nproc(config.launch.nproc if args.nproc is None else args.nproc, config.launch.device)
    if nproc < 1:
        raise UserError("--nproc", nproc, "must be at least 1", "Give 1 or more.")
    check_output_folder("--out", args.out)
    if dataset_spec(config.data.dataset).layout == "features":
        return _print(args, _project(args, config))
    if args.clusters is not None:
        remedy = "First write the features, then their clusters, with data.dataset=features."
        raise UserError("--clusters", args.clusters, "needs existing features", remedy)
    data = _open_images(config)

    # These import torch, so they come after the checks.
    from dl2pa.features.write import FeatureOptions, write_features

    _stop_on_signals(args.out)
    try:
        record = write_features(config, data, args.out, FeatureOptions(args.dtype or _DTYPE, args.pca, nproc))
    except KeyboardInterrupt:
        note("stopped; the same command continues")
        return EXIT_STOPPED
    return _print(args, record)


def _print(args: argparse.Namespace, record: dict[str, Any]) -> int:
    say(_result(args, record), args.json, "features:")
    if not args.json:
        settings = f"data.dataset=features data.root={args.out} data.loader=auto model.backbone=identity"
        note(f"train on them: dl2pa train CONFIG {settings}")
    return EXIT_DONE


def _project(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Write the principal components of features that exist already, or the same features with more classes."""
    from pipelines.datasets.features import FeatureFolder

    root = Path(config.data.root or "")
    _check_all_images(config)
    if config.data.val_fraction is not None:
        message, remedy = (
            "existing features keep their splits",
            "Leave it out here, and set it when training.",
        )
        raise UserError("data.val_fraction", config.data.val_fraction, message, remedy)
    if args.clusters is not None and args.dtype is not None:
        message = "cannot be combined with --clusters, which keeps the stored numbers"
        raise UserError("--dtype", args.dtype, message, "Leave it out.")
    if args.clusters is not None and args.pca is not None:
        message = "cannot be combined with --pca"
        raise UserError(
            "--clusters", args.clusters, message, "First write the components, then their clusters."
        )
    if args.clusters is not None:
        from dl2pa.features.cluster import cluster_features  # imports torch

        FeatureFolder(root).read_complete()
        return cluster_features(root, args.out, args.clusters)
    if args.pca is None:
        remedy = "Give the data set of the images, or --pca N or --clusters N for data from these features."
        raise UserError("data.dataset", config.data.dataset, "contains no images", remedy)
    FeatureFolder(root).read_complete()

    from dl2pa.features.project import project_features  # imports torch, so it comes after the checks

    return project_features(root, args.out, args.pca, args.dtype or _DTYPE)


def _stop_on_signals(out: Path) -> None:
    """Let all processes end at their next batch after Ctrl-C or SIGTERM; what they have finished is kept."""
    from pipelines.datasets.features import FeatureFolder

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        with suppress(OSError):
            FeatureFolder(out).stop.touch()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _check_all_images(config: Config) -> None:
    """Refuse settings that select images or change labels: the features of all images are written.

    Raises:
        UserError: the first of them.
    """
    data, remedy = config.data, "Leave it out here, and set it when training on the features."
    for key, message in (
        ("imbalance", "the features of all images are written"),
        ("label_noise", "changes the labels"),
        ("calibration_fraction", "the features of all images are written"),
    ):
        if value := getattr(data, key):
            raise UserError(f"data.{key}", value, message, remedy)


def _open_images(config: Config) -> DataSplits:
    """Open both splits and check what the features depend on.

    Raises:
        UserError: the first invalid field.
    """
    from dl2pa.config.checks import check_image_size, check_loader
    from dl2pa.specs import backbone_spec
    from dl2pa.training.data import DataSplits, open_split

    _check_all_images(config)
    if backbone_spec(config.model.backbone).takes_features:
        remedy = "Set the network that computes the features, and its weights by model.init."
        raise UserError("model.backbone", config.model.backbone, "takes features, not images", remedy)
    check_loader(config)
    check_image_size(config)
    train, val = open_split(config, "train"), open_split(config, "val")
    return DataSplits(train, val, tuple(train.classes))


def _result(args: argparse.Namespace, record: dict[str, Any]) -> dict[str, Any]:
    pca = record["network"]["pca"]
    return {
        "out": str(args.out),
        "dim": record["dim"],
        "dtype": record["dtype"],
        "train": record["splits"]["train"]["images"],
        "val": record["splits"]["val"]["images"],
        "skipped": sum(split["skipped"] for split in record["splits"].values()),
        "classes": len(record["classes"]),
        "seconds": record["seconds"],
        "images_per_second": record["images_per_second"],
        "explained_variance": None if pca is None else pca["explained"],
        "network_sha256": record["network"]["sha256"],
    }
