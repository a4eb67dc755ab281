"""Benchmarks of `dl2pa bench` and `dl2pa estimate`; each prints hardware, versions and repetitions."""

from __future__ import annotations

from pathlib import Path

from dl2pa.errors import UserError
from dl2pa.specs import BACKBONES

FILE_LOADERS = ("dali", "torchvision")
TRAIN_LOADERS = ("synthetic", "resident", *FILE_LOADERS)
PRECISIONS = ("fp32", "bf16", "fp16")
OURS = "ours"
LOADERS = (OURS, "native-dali", "torchvision", "synthetic")
PACKED = "packed"
"""Loader `ours` on shards of the same images, as written by `dl2pa data pack --short-side 256`."""
NEEDS_DALI = (OURS, PACKED, "native-dali")

LINK_GB_PER_S = 50.0
"""Bandwidth per GPU and direction between nodes: InfiniBand of 400 Gbit/s, one adapter per GPU (NVIDIA's DGX H100 data
sheet)."""


def check_loader(loader: str, model: str, root: Path | None) -> None:
    """Check that a loader of ``TRAIN_LOADERS`` can train a backbone of ``BACKBONES`` with images from `root`.

    Raises:
        UserError: it needs a folder, or does not support the backbone.
    """
    if loader == "resident" and not BACKBONES[model].small:
        remedy = "Use synthetic, dali or torchvision."
        raise UserError("--loaders", loader, f"does not support {model}", remedy)
    if loader in FILE_LOADERS and root is None:
        raise UserError("--data", None, f"is required for {loader}", "Give a folder with train/ and val/.")


def check_folder(root: Path | None) -> None:
    """Check the folder of images of `--data`, if it is given.

    Raises:
        UserError: it is not a folder.
    """
    if root is not None and not root.is_dir():
        remedy = "Give a folder with one folder of images per class."
        raise UserError("--data", str(root), "is not a folder", remedy)
