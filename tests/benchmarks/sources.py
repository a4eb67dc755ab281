"""Read times of encoded images from files, tar shards and Parquet files, and the start with lists like ImageNet-LT's.

    PYTHONPATH=.:tests python -m benchmarks.sources PHOTOGRAPHS [--images 3000] [--rounds 3]

One thread, from the page cache, without decoding; without torch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.datasets import ImageTable, open_dataset
from pipelines.datasets.build_index import build_index, list_source
from pipelines.datasets.index import INDEX_NAME
from pipelines.datasets.lists import ListOptions
from pipelines.datasets.pack import PackOptions, pack

_ROW_GROUP = 100
_CACHED_GROUPS = 6
_MAX_SLOW = 300
"""Images that are read from sources that take milliseconds per image."""


def _open(root: Path) -> ImageTable:
    table = open_dataset("imagefolder", root, root, None, "train")
    assert isinstance(table, ImageTable)
    return table


def _tables(images: list[bytes], place: Path) -> dict[str, Callable[[int], bytes]]:
    """Readers of the same images by the name of their source."""
    folder = place / "folder"
    for i, data in enumerate(images):
        file = folder / f"train/c{i * 10 // len(images)}/{i:06d}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    build_index(folder, folder / INDEX_NAME, 1)
    pack(list_source(folder), place / "shards", PackOptions(), 1, lambda done, total: None)
    result = {"files": _open(folder).read, "tar shards": _open(place / "shards").read}
    labels = [i * 10 // len(images) for i in range(len(images))]
    for codec in ("none", "snappy", "zstd"):
        root = place / codec
        root.mkdir()
        rows = [{"bytes": data, "path": f"{i}.JPEG"} for i, data in enumerate(images)]
        file = root / "train-0.parquet"
        pq.write_table(
            pa.table({"image": rows, "label": labels}), file, row_group_size=_ROW_GROUP, compression=codec
        )
        start = time.perf_counter()
        build_index(root, root / INDEX_NAME, 1)
        table = _open(root)
        assert table.members is not None and table.members.spans is not None
        ratio = table.members.spans.sizes.sum() / table.lengths.sum()
        seconds = time.perf_counter() - start
        print(f"Parquet, {codec}: indexed in {seconds:.2f} s, {ratio:.2f} bytes read per byte of an image")
        result[f"Parquet, {codec}"] = table.read
    return {**result, "Parquet, snappy, row groups": _group_reader(place / "snappy/train-0.parquet")}


def _group_reader(path: Path) -> Callable[[int], bytes]:
    """Read by row group with pyarrow, and keep the last ones."""
    file, groups = pq.ParquetFile(path), dict[int, Any]()

    def read(i: int) -> bytes:
        number, row = divmod(i, _ROW_GROUP)
        if number not in groups:
            groups[number] = file.read_row_group(number, columns=["image.bytes"]).column(0)
            if len(groups) > _CACHED_GROUPS:
                del groups[next(iter(groups))]
        return groups[number][row]["bytes"].as_py()

    return read


def _bench_reads(photographs: Path, count: int, rounds: int, place: Path) -> None:
    files = sorted(path for path in photographs.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    images = [files[i % len(files)].read_bytes() for i in range(count)]
    print(f"{count:,} images of {sum(map(len, images)) / count / 1000:.0f} kB")
    readers = _tables(images, place)
    shuffled = np.random.default_rng(0).permutation(count).tolist()
    fastest: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        for name, read in readers.items():
            slow = name.endswith(("zstd", "groups"))
            for order, samples in (("shuffled", shuffled), ("in order", list(range(count)))):
                chosen = samples[:_MAX_SLOW] if slow and order == "shuffled" else samples
                start = time.perf_counter()
                for i in chosen:
                    assert len(read(i)) == len(images[i])
                each = (time.perf_counter() - start) / len(chosen) * 1e6
                fastest[name, order] = min(each, fastest.get((name, order), each))
    for (name, order), each in fastest.items():
        print(f"{name:28} {order:9} {each:7.0f} us per image")


_START = """
import time
start = time.perf_counter()
from pathlib import Path
from pipelines.datasets import open_dataset
imported = time.perf_counter()
sizes = [len(open_dataset("imagefolder", Path({root!r}), None, None, split)) for split in ("train", "val")]
end = time.perf_counter()
print(f"{{sizes}}: imports {{imported - start:.2f}} s, both splits {{end - imported:.2f}} s")
"""


def _bench_lists(photographs: Path, rounds: int, place: Path) -> None:
    """115,846 and 20,000 links to small files in 1,000 folders each, with class sizes from 640 to 5."""
    data = next(photographs.rglob("*.JPEG")).read_bytes()
    sizes = np.maximum(5, 640 * (5 / 640) ** (np.arange(1000) / 999)).round().astype(int)
    sizes = np.maximum(5, sizes * 115_846 // sizes.sum())
    sizes[0] += 115_846 - sizes.sum()
    number, target = 0, place
    for split, counts in (("train", sizes.tolist()), ("val", [20] * 1000)):
        lines: list[str] = []
        for label, count in enumerate(counts):
            folder = place / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                if number % 30_000 == 0:  # ext4 limits the links to a file
                    target = place / f"{number}.JPEG"
                    target.write_bytes(data)
                number += 1
                os.link(target, folder / f"{i}.JPEG")
                lines.append(f"{split}/{folder.name}/{i}.JPEG {label}\n")
        (place / f"{split}.txt").write_text("".join(lines))
    start = time.perf_counter()
    options = ListOptions(place / "train.txt", place / "val.txt")
    build_index(place, place / INDEX_NAME, 1, options=options)
    print(f"lists: indexed in {time.perf_counter() - start:.1f} s by one process")
    for kind in ("unchanged", "all training folders with another time"):
        for _ in range(rounds):
            code = _START.format(root=str(place))
            output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            print(f"start, {kind}: {output.stdout.strip()}")
        for folder in (place / "train").iterdir():
            os.utime(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="dl2pa-bench-"))
    try:
        (place / "lists").mkdir()
        _bench_reads(args.photographs, args.images, args.rounds, place)
        _bench_lists(args.photographs, args.rounds, place / "lists")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
