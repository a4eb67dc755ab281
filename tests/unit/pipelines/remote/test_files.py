"""Reading shards on a real S3 server: content, number of requests, faults and changes."""

from __future__ import annotations

import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dl2pa.errors import StorageUnavailable, UserError
from pipelines.datasets import ImageTable
from pipelines.encoded import FaultLimits, ImageReader
from pipelines.remote.address import RemoteOptions
from pipelines.remote.blocks import BLOCK
from pipelines.remote.files import RemoteFiles
from pipelines.remote.store import Store
from pipelines.transforms import Transforms
from support.objects import BUCKET, FaultyConnection, ObjectServer

Open = Callable[..., ImageTable]
Ranges = list[tuple[str, int, int]]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Ranges:
    """The ranges that are requested: object, begin, end."""
    ranges: Ranges = []
    whole = Store.range

    async def recorded(self: Store, path: Any, tag: str, begin: int, end: int) -> bytes:
        ranges.append((path.name, begin, end))
        return await whole(self, path, tag, begin, end)

    monkeypatch.setattr(Store, "range", recorded)
    return ranges


@pytest.fixture
def connection(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyConnection]:
    proxy = FaultyConnection(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    yield proxy
    proxy.close()


def all_equal(table: ImageTable, local: ImageTable) -> bool:
    return all(table.read(i) == local.read(i) for i in range(len(local)))


def test_images_fingerprint_and_names_equal_those_of_local_shards(
    uploaded: str, open_at: Open, local: ImageTable
) -> None:
    table = open_at(uploaded)
    assert (table.fingerprint, table.classes) == (local.fingerprint, ("cat", "dog"))
    assert all_equal(table, local)
    assert str(table.path(3)) == f"{uploaded}/{local.path(3).relative_to(local.root)}"
    assert len(open_at(uploaded, "val")) == 12


def test_announced_samples_take_few_requests_and_each_block_is_read_once(
    uploaded: str, open_at: Open, local: ImageTable, requests: Ranges
) -> None:
    table = open_at(uploaded)
    requests.clear()
    order = np.random.default_rng(0).permutation(len(local)).tolist()
    table.will_read(order[:20])
    table.will_read(order[20:])
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(table.read, order)) == [local.read(i) for i in order]
    sizes = {path.name: path.stat().st_size for path in local.root.glob("train*.tar")}
    assert sum(end - begin for _, begin, end in requests) <= sum(sizes.values())
    assert len(requests) < sum(-(-size // BLOCK) for size in sizes.values())
    requests.clear()
    assert all_equal(pickle.loads(pickle.dumps(table)), local)
    assert requests == [], "from the cache, also in another process"


def test_without_a_cache_announced_blocks_are_kept_until_they_are_read(
    uploaded: str, open_at: Open, local: ImageTable, options: RemoteOptions, requests: Ranges
) -> None:
    table = open_at(uploaded, "train", replace(options, s3_cache_gib=0))
    table.will_read(range(len(local)))
    announced = len(requests)
    assert all_equal(table, local)
    assert len(requests) == max(announced, len(requests)) <= len(local)


@pytest.mark.parametrize("fault", ["busy", "cut", "refused"])
def test_failing_requests_are_repeated(
    fault: str,
    uploaded: str,
    open_at: Open,
    local: ImageTable,
    connection: FaultyConnection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    table = open_at(uploaded)
    connection.fail(fault, 2)
    assert all_equal(table, local)
    assert "retrying for up to 60 s" in caplog.text
    assert "answers again" in caplog.text


def test_an_outage_longer_than_the_retries_is_no_user_error(
    server: ObjectServer, uploaded: str, open_at: Open, options: RemoteOptions
) -> None:
    """An unreadable image would be replaced by another one."""
    table = open_at(uploaded, "train", replace(options, s3_timeout_s=0.2, s3_retry_s=0.3, s3_cache_gib=0))
    reader = ImageReader(table, Transforms(image_size=8, train=True), 0, FaultLimits())
    with server.suspended(), pytest.raises(StorageUnavailable, match=r"train-.*the same command continues"):
        reader.fetch(0, 1)
    assert reader.bad == {}
    assert reader.fetch(0, 1) is not None


def test_a_short_outage_only_delays(
    server: ObjectServer, uploaded: str, open_at: Open, local: ImageTable, options: RemoteOptions
) -> None:
    table = open_at(uploaded, "train", replace(options, s3_timeout_s=0.2, s3_cache_gib=0))
    failed = threading.Event()
    table_store = Store._failed  # pyright: ignore[reportPrivateUsage]

    def noted(self: Store, *rest: Any) -> None:
        failed.set()
        table_store(self, *rest)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(Store, "_failed", noted)
        with server.suspended():
            reading = pool.submit(table.read, 5)
            assert failed.wait(60)
        assert reading.result(60) == local.read(5)


def test_a_changed_object_is_refused_and_the_cache_keeps_the_old_content(
    server: ObjectServer, uploaded: str, open_at: Open, local: ImageTable, options: RemoteOptions
) -> None:
    table = open_at(uploaded)
    first = table.read(0)
    shard = local.root / local.files[0]
    data = bytearray(shard.read_bytes())
    data[local.members.offsets.item(0) + 100] ^= 255  # pyright: ignore[reportOptionalMemberAccess]
    key = f"{uploaded.removeprefix(f's3://{BUCKET}/')}/{shard.name}"
    server.client().put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
    assert table.read(0) == first
    changed = replace(table, remote=RemoteFiles(*uncached(table, options)))
    with pytest.raises(UserError, match=r"has changed since it was indexed or opened") as refused:
        changed.read(0)
    assert (refused.value.field, refused.value.value) == ("data.root", f"{uploaded}/{shard.name}")
    reader = ImageReader(changed, Transforms(image_size=8, train=True), 0, FaultLimits())
    with pytest.raises(UserError, match="has changed since"):
        reader.fetch(0, 0)
    now = open_at(uploaded)  # the index of the upload has no ETags
    assert now.read(0) == bytes(data[slice(*extent(local, 0))]) != first


def uncached(table: ImageTable, options: RemoteOptions) -> tuple[Any, Any]:
    folder, objects = table.remote.__reduce__()[1]  # pyright: ignore[reportOptionalMemberAccess]
    folder = folder / ""
    folder.options = replace(options, s3_cache_gib=0)
    return folder, objects


def extent(table: ImageTable, i: int) -> tuple[int, int]:
    assert table.members is not None
    offset = table.members.offsets.item(i)
    return offset, offset + table.lengths.item(i)
