"""Copies of objects, without a server."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dl2pa.errors import StorageUnavailable
from pipelines.remote import store
from pipelines.remote.address import RemotePath
from pipelines.remote.store import RemoteObject, Store


class LateStore(Store):
    """The first part of an object fails; the others arrive when `arrive` is set."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._files: Any = SimpleNamespace(loop=loop)
        self.arrive = asyncio.Event()

    async def range(self, path: RemotePath, tag: str, begin: int, end: int) -> bytes:
        if not begin:
            raise StorageUnavailable("no answer")
        await self.arrive.wait()
        return bytes(end - begin)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_failed_copy_writes_nothing_later(
    loop: asyncio.AbstractEventLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file may have the number of the closed one by then."""
    monkeypatch.setattr(store, "_PART", 10)
    late = LateStore(loop)
    with pytest.raises(StorageUnavailable):
        late.download(RemotePath("b/k"), RemoteObject("k", 40, "t", 0), tmp_path / "k", durable=False)
    others = [(tmp_path / f"{i}").open("w+b") for i in range(3)]
    asyncio.run_coroutine_threadsafe(_set(late.arrive), loop).result(60)
    assert [os.fstat(file.fileno()).st_size for file in others] == [0, 0, 0]
    for file in others:
        file.close()
    assert not (tmp_path / "k").exists()


async def _set(event: asyncio.Event) -> None:
    event.set()
    for _ in range(5):
        await asyncio.sleep(0)
