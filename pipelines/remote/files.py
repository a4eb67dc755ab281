"""Shards in object storage, read by block: ahead of their use, in many requests at a time, through the node's cache."""

from __future__ import annotations

import bisect
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from pipelines.remote.address import RemoteOptions, RemotePath
from pipelines.remote.blocks import BLOCK, BlockCache, cache_of
from pipelines.remote.store import RemoteObject, Store, store_of

Place = tuple[int, int, int]
"""Number of a shard, offset in it and length of a range of bytes."""

_MAX_BLOCKS = 32
"""Blocks of one request: 4 MiB."""
_KEPT_PLANS = 8
"""Announced steps whose blocks stay in memory until they are read: more than are read ahead."""

_Blocks = Future["dict[int, bytes]"]


class RemoteFiles:
    """The shards of one split. Used by many threads; another process connects itself.

    Args:
        folder: of the shards.
        objects: the shards, in the order of their numbers.
    """

    def __init__(self, folder: RemotePath, objects: Sequence[RemoteObject]) -> None:
        self._folder, self._objects = folder, tuple(objects)
        self._options: RemoteOptions = folder.options
        self._first = [0]
        """First block of each shard; the last entry is the number of blocks."""
        for one in self._objects:
            self._first.append(self._first[-1] + -(-one.size // BLOCK))
        self._starts = frozenset(self._first)
        self._lock = threading.Lock()
        self._pid = -1
        self._in_flight: dict[int, _Blocks] = {}
        self._plans: deque[dict[Place, dict[int, _Blocks]]] = deque(maxlen=_KEPT_PLANS)
        self._store: Store | None = None
        self._cache: BlockCache | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFiles, (self._folder, self._objects)

    @property
    def identity(self) -> str:
        """Digest of the shards and their ETags."""
        server = [os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")]
        shards = [(one.name, one.size, one.tag) for one in self._objects]
        return hashlib.sha256(repr((server, str(self._folder), BLOCK, shards)).encode()).hexdigest()[:32]

    def will_read(self, places: Iterable[Place]) -> None:
        """Begin to read ranges that ``read`` will ask for soon; returns at once."""
        store, cache = self._connected()
        blocks = {place: self._blocks_of(*place) for place in places}
        futures = self._request(store, cache, {block for each in blocks.values() for block in each})
        plan = {
            place: {block: futures[block] for block in each if block in futures}
            for place, each in blocks.items()
        }
        with self._lock:
            self._plans.append({place: each for place, each in plan.items() if each})

    def read(self, shard: int, path: Callable[[int], Path], offset: int, length: int) -> bytes:
        """Read `length` bytes of a shard; fewer at its end.

        Raises:
            UserError: the shard has changed or may not be read.
            StorageUnavailable: the server does not answer.
        """
        store, cache = self._connected()
        with self._lock:
            place = (shard, offset, length)
            announced = next((plan.pop(place) for plan in self._plans if place in plan), {})
        blocks = self._blocks_of(*place)
        missing = [block for block in blocks if block not in announced and block not in cache]
        futures = {**announced, **self._request(store, cache, missing)}
        parts: list[bytes] = []
        for block in blocks:
            begin, end, size = self._part(shard, block, offset, length)
            data = None
            if block not in futures:
                data = cache.read(block, size, begin, end)
                if data is None:  # removed or damaged
                    futures.update(self._request(store, cache, [block], again=True))
            parts.append(futures[block].result()[block][begin:end] if data is None else data)
        return b"".join(parts)

    def _connected(self) -> tuple[Store, BlockCache]:
        with self._lock:
            if self._pid != os.getpid():
                self._pid = os.getpid()
                self._in_flight, self._store = {}, store_of(self._options)
                self._plans.clear()
                limit = int(self._options.s3_cache_gib * 2**30)
                self._cache = cache_of(self._options.folder(), self.identity, self._first[-1], limit)
            assert self._store is not None and self._cache is not None
            return self._store, self._cache

    def _blocks_of(self, shard: int, offset: int, length: int) -> range:
        """Blocks of a range, cut at the end of its shard."""
        end = min(offset + length, self._objects[shard].size)
        first = self._first[shard]
        return range(first + offset // BLOCK, first + -(-end // BLOCK)) if end > offset else range(0)

    def _part(self, shard: int, block: int, offset: int, length: int) -> tuple[int, int, int]:
        """Begin and end of a range in one of its blocks, and the size of the block."""
        start = (block - self._first[shard]) * BLOCK
        size = min(BLOCK, self._objects[shard].size - start)
        return max(0, offset - start), min(size, offset + length - start), size

    def _request(
        self, store: Store, cache: BlockCache, blocks: Iterable[int], *, again: bool = False
    ) -> dict[int, _Blocks]:
        """Requests of the blocks that are not in the cache; pending ones are shared.

        Args:
            again: request them although the cache seems to have them.
        """
        wanted = sorted(set(blocks))
        with self._lock:
            missing = [b for b in wanted if b not in self._in_flight and (again or b not in cache)]
            for run in self._runs(missing):
                future = store.start(self._fetch(store, cache, run))
                self._in_flight.update(dict.fromkeys(run, future))
            return {block: self._in_flight[block] for block in wanted if block in self._in_flight}

    def _runs(self, blocks: list[int]) -> list[range]:
        """Consecutive blocks of one shard, to be read by one request."""
        runs: list[range] = []
        for block in blocks:
            last = runs[-1] if runs else range(0)
            if last and last.stop == block and len(last) < _MAX_BLOCKS and block not in self._starts:
                runs[-1] = range(last.start, block + 1)
            else:
                runs.append(range(block, block + 1))
        return runs

    async def _fetch(self, store: Store, cache: BlockCache, run: range) -> dict[int, bytes]:
        try:
            shard = bisect.bisect_right(self._first, run.start) - 1
            one = self._objects[shard]
            start = (run.start - self._first[shard]) * BLOCK
            end = min(start + len(run) * BLOCK, one.size)
            data = memoryview(await store.range(self._folder / one.name, one.tag, start, end))
            result = {block: bytes(data[i * BLOCK : (i + 1) * BLOCK]) for i, block in enumerate(run)}
            for block, content in result.items():
                cache.write(block, content)
            return result
        finally:
            with self._lock:
                for block in run:
                    self._in_flight.pop(block, None)
