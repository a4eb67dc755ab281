"""Read times of encoded images from tar shards in object storage, relative to the same shards on this machine.

    PYTHONPATH=.:tests python -m benchmarks.remote PHOTOGRAPHS [--images 2000] [--rounds 3]

Steps of 64 images are announced three steps ahead and read by four threads, as in training, without decoding; without
torch. The server on loopback is moto, or with `--fast` one that only knows listings and ranges: both are processes of
Python on the same cores, so that their speed is a lower bound of that of dl2pa. `--latency MS` delays each answer of
the second one, as the distance to S3 does.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import tempfile
import time
import urllib.parse
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.datasets import ImageTable, open_dataset
from pipelines.datasets.build_index import list_source
from pipelines.datasets.pack import PackOptions, pack
from pipelines.readers import ReaderPool
from pipelines.remote.address import RemoteOptions, place_of
from support.objects import BUCKET, ObjectServer
from support.servers import free_port

_STEP, _AHEAD, _THREADS = 64, 3, 4
_SHARD = 1 << 21
"""Small, because moto reads an object completely for each range of it."""


class _Ranges(BaseHTTPRequestHandler):
    """Listings of folders and ranges of files, in the words of S3."""

    protocol_version = "HTTP/1.1"
    root = Path()
    latency_s = 0.0

    def do_GET(self) -> None:
        time.sleep(self.latency_s)
        address = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        if "list-type" in query:
            self._answer(200, self._listing(query.get("prefix", "")))
            return
        begin, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        with (self.root / urllib.parse.unquote(address.path).lstrip("/").partition("/")[2]).open(
            "rb"
        ) as file:
            self._answer(206, os.pread(file.fileno(), end - begin + 1, begin))

    def _listing(self, prefix: str) -> bytes:
        files = [path for path in sorted((self.root / prefix).glob("*")) if path.is_file()]
        entry = (
            "<Contents><Key>{}</Key><LastModified>{}</LastModified><ETag>{}</ETag><Size>{}</Size></Contents>"
        )
        date = "2026-01-01T00:00:00.000Z"
        parts = [entry.format(f"{prefix}{path.name}", date, '"1"', path.stat().st_size) for path in files]
        return f"<ListBucketResult>{''.join(parts)}</ListBucketResult>".encode()

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _serve(root: Path, port: int, latency_s: float) -> None:
    _Ranges.root, _Ranges.latency_s = root, latency_s
    ThreadingHTTPServer(("127.0.0.1", port), _Ranges).serve_forever()


@contextlib.contextmanager
def _serving(shards: Path, fast: bool, latency_s: float) -> Generator[str]:
    """A server with the shards; yields their address."""
    if not fast:
        server = ObjectServer()
        os.environ.update(server.environment)
        try:
            yield server.upload(shards, "shards")
        finally:
            server.close()
        return
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(shards, port, latency_s), daemon=True
    )
    process.start()
    os.environ.update(ObjectServer.variables(port))
    try:
        yield f"s3://{BUCKET}"
    finally:
        process.kill()


def _open(root: Path) -> ImageTable:
    table = open_dataset("imagefolder", root, root, None, "train")
    assert isinstance(table, ImageTable)
    return table


def _read(table: ImageTable, order: Sequence[int], pool: ReaderPool) -> float:
    """Images per second."""

    def fetch(samples: Sequence[int]) -> int:
        return sum(len(table.read(i)) for i in samples)

    start = time.perf_counter()
    ahead: deque[list[Future[int]]] = deque()
    for begin in range(0, len(order), _STEP):
        step = order[begin : begin + _STEP]
        table.will_read(step)
        ahead.append([pool.submit(partial(fetch, step[i : i + 4])) for i in range(0, len(step), 4)])
        if len(ahead) == _AHEAD:
            for job in ahead.popleft():
                job.result()
    for job in (job for jobs in ahead for job in jobs):
        job.result()
    return len(order) / (time.perf_counter() - start)


def _one_by_one(table: ImageTable, order: Sequence[int]) -> float:
    start = time.perf_counter()
    for i in order:
        table.read(i)
    return len(order) / (time.perf_counter() - start)


def _prepare(photographs: Path, count: int, place: Path) -> Path:
    files = sorted(path for path in photographs.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    for i in range(count):
        file = place / f"folder/train/c{i * 10 // count}/{i:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.symlink_to(files[i % len(files)].resolve())
    pack(
        list_source(place / "folder"),
        place / "shards",
        PackOptions(shard_size=_SHARD),
        1,
        lambda done, total: None,
    )
    return place / "shards"


def _measure(shards: Path, address: str, cache: Path, rounds: int) -> dict[str, list[float]]:
    local, pool = _open(shards), ReaderPool(_THREADS)
    in_order = list(range(len(local)))
    shuffled = np.random.default_rng(0).permutation(len(local)).tolist()
    speeds: dict[str, list[float]] = {}

    def note(name: str, speed: float) -> None:
        speeds.setdefault(name, []).append(speed)

    for i in range(rounds):
        options = RemoteOptions(str(cache / str(i)), 20.0)
        note("local, shuffled", _read(local, shuffled, pool))
        note("local, in order", _read(local, in_order, pool))
        first = _open(place_of("root", address, options))
        note("object storage, shuffled, empty cache", _read(first, shuffled, pool))
        note("object storage, shuffled, filled cache", _read(first, shuffled, pool))
        bare = _open(place_of("root", address, replace(options, s3_cache_gib=0)))
        note("object storage, shuffled, no cache", _read(bare, shuffled, pool))
        note("object storage, in order, no cache", _read(bare, in_order, pool))
        note("object storage, shuffled, no cache, one request at a time", _one_by_one(bare, shuffled[:200]))
        shutil.rmtree(cache / str(i))
    pool.close()
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--latency", type=float, default=0.0, metavar="MS")
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="dl2pa-bench-"))
    try:
        shards = _prepare(args.photographs, args.images, place)
        size = sum(path.stat().st_size for path in shards.rglob("*.tar")) / args.images / 1000
        print(f"{args.images:,} images of {size:.0f} kB; median of {args.rounds} rounds")
        with _serving(shards, args.fast, args.latency / 1000) as address:
            speeds = _measure(shards, address, place / "cache", args.rounds)
        for name, each in speeds.items():
            reference = speeds[f"local, {'in order' if 'in order' in name else 'shuffled'}"]
            ratio = np.median(np.array(each) / np.array(reference))
            print(f"{name:60} {np.median(each):8.0f} images/s, {ratio:.3f} of local")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
