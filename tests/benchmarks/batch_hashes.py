"""Hashes of all batches of an epoch, to compare two versions: `python -P tests/benchmarks/batch_hashes.py ROOT`.

ROOT has train/ and val/ with class folders. One line per loader, augmentation and world size; the ranks of a world are
joined to global batches, so a hash of training must be the same for every world size, and all must be the same in both
versions. The padding of validation depends on the world size.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from pipelines.build import build_pipeline
from pipelines.datasets.build_index import list_source
from pipelines.datasets.folder import index_folder
from pipelines.datasets.pack import PackOptions, pack
from pipelines.datasets.table import ImageTable
from pipelines.encoded import FaultLimits
from pipelines.sampler import EvalSampler, TrainSampler
from pipelines.transforms import Transforms

BATCH, SIDE, SEED, EPOCH = 64, 96, 3, 1
LIMITS = FaultLimits(max_bad_fraction=0.5, max_bad_val_fraction=0.1)
AUGMENTATIONS = {
    "none": {},
    "trivial": {"trivial_augment": True},
    "erasing": {"erasing": 0.25},
    "both": {"trivial_augment": True, "erasing": 0.25},
    "rand": {"rand_augment": 2, "color_jitter": (0.4, 0.4, 0.4, 0.1)},
}
Make = Callable[[int, int], TrainSampler | EvalSampler]


def batches_hash(table: ImageTable, loader: str, transforms: Transforms, make: Make, world: int) -> str:
    """First 16 digits of the SHA-256 over indices, targets, pixels and counts of all global batches."""
    pipelines = [
        build_pipeline(
            table,
            transforms,
            make(rank, world),
            loader=loader,
            seed=SEED,
            device=torch.device("cpu"),
            threads=2,
            limits=LIMITS,
        )
        for rank in range(world)
    ]
    for pipeline in pipelines:
        pipeline.start(EPOCH)
    digest = hashlib.sha256()
    for ranks in zip(*pipelines, strict=True):
        for name in ("indices", "targets", "images"):
            joined = torch.cat([getattr(batch, name) for batch in ranks])
            digest.update(joined.contiguous().numpy().tobytes())
        digest.update(repr((sum(b.valid for b in ranks), sum(b.missing for b in ranks))).encode())
    for pipeline in pipelines:
        pipeline.close()
    return digest.hexdigest()[:16]


def damaged(folder: Path, out: Path) -> ImageTable:
    """A copy with four unreadable images."""
    shutil.copytree(folder, out, copy_function=shutil.copyfile)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    files[5].write_bytes(b"")
    files[77].write_bytes(b"text")
    files[130].write_bytes(files[130].read_bytes()[:3000])
    files[40].write_bytes(files[40].read_bytes().replace(b"\xff\xdb", b"\xff\xfe"))  # rejected by the decoder
    return index_folder(out, None, "ROOT")


def main(root: Path, scratch: Path) -> None:
    """Print the hashes of training and validation."""
    torch.set_num_threads(1)
    train, val = (index_folder(root / split, None, "ROOT") for split in ("train", "val"))
    packed = pack(
        list_source(root / "train"),
        scratch / "packed",
        PackOptions(short_side=128, shard_size=2_000_000),
        1,
        lambda _done, _total: None,
    ).index.splits
    sources = [
        ("folder", train, ("dali", "torchvision", "resident")),
        ("shards", next(iter(packed.values())).table, ("dali",)),
        ("damaged", damaged(root / "train", scratch / "train"), ("dali", "torchvision")),
    ]
    for augmentation, options in AUGMENTATIONS.items():
        for source, table, loaders in sources:
            for loader in loaders:
                crop = {"crop": "pad", "pad": 8} if loader == "resident" else {}
                transforms = Transforms(SIDE, train=True, **crop, **options)  # type: ignore[arg-type]
                for world in (1, 2, 4):
                    digest = batches_hash(
                        table,
                        loader,
                        transforms,
                        lambda r, w: TrainSampler(len(train), BATCH, SEED, r, w),
                        world,
                    )
                    print(f"train {source} {loader} {augmentation} world={world} {digest}", flush=True)
    evaluation = Transforms(SIDE, train=False, eval_resize=110)
    for source, table in (("folder", val), ("damaged", damaged(root / "val", scratch / "val"))):
        for loader in ("dali", "torchvision"):
            for world in (1, 3):
                digest = batches_hash(
                    table, loader, evaluation, lambda r, w: EvalSampler(len(val), BATCH, r, w), world
                )
                print(f"val {source} {loader} world={world} {digest}", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1]), Path(folder))
