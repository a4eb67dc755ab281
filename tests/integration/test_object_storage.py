"""A run from shards on a real S3 server: an outage ends it, and the resumed run has the bits of one from a folder."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.commands import run_here
from support.objects import ObjectServer, object_server
from support.runs import Training, assert_identical
from support.waiting import eventually

pytestmark = pytest.mark.xdist_group("runs")
EPOCH = {"train": {"epochs": 1}, "checkpoint": {"every_steps": 3, "every_epochs": 0}}


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    yield from object_server()


@pytest.fixture
def address(server: ObjectServer, digits: Path, tmp_path: Path) -> str:
    """The digits in shards on the server, indexed there."""
    packed = tmp_path / "packed"
    done = run_here("data", "pack", digits, packed, "--shard-size", "300KiB", "--workers", "1")
    assert done.code == 0, done.error
    address = server.upload(packed, "digits/v1", leave_out=("dl2pa.index",))
    done = run_here("data", "index", address, "--workers", "1", "--json")
    assert done.code == 0, done.error
    assert done.result["images"] == {"train": 1438, "val": 359}
    return address


def test_outage_ends_the_run_and_the_resumed_run_is_identical(
    server: ObjectServer,
    address: str,
    train: Callable[..., Training],
    undisturbed: Callable[..., Training],
    tmp_path: Path,
) -> None:
    training = train(1, "s3", EPOCH)
    without_cache = ("data.s3_cache_gib=0", "data.s3_timeout_s=0.5", "data.s3_retry_s=0.5")
    place = (f"data.root={address}", f"data.s3_cache_dir={tmp_path / 'cache'}")
    saved = training.run / "latest"

    def suspend_after_a_checkpoint() -> None:
        eventually(saved.exists, "a checkpoint")
        suspended.enter_context(server.suspended())

    with ExitStack() as suspended:
        watcher = threading.Thread(target=suspend_after_a_checkpoint)
        watcher.start()
        failed = training.program.run(*training.command(*place, *without_cache))
        watcher.join()
    assert failed.code == 1
    assert "could not be read" in failed.result["error"]["message"]
    assert "Traceback" not in failed.error
    assert "retrying for up to 0.5 s" in failed.error
    report = json.loads((training.run / "logs/rank-0.error.json").read_text())
    assert not report["final"], "the supervisor starts the job again"
    assert 3 <= training.status["step"] < 29
    done = training.finish(*place)
    assert "resuming at epoch 0" in done.error
    assert_identical(training.run, undisturbed(1, EPOCH).run)
    secret = server.environment["AWS_SECRET_ACCESS_KEY"].encode()
    key = server.environment["AWS_ACCESS_KEY_ID"].encode()
    written = [file.read_bytes() for file in training.run.rglob("*") if file.is_file()]
    assert not any(secret in content or key in content for content in written)
    assert secret.decode() not in failed.error + done.error


def test_wrong_buckets_are_refused_before_anything_is_written(
    server: ObjectServer, train: Callable[..., Training]
) -> None:
    training = train(1, "wrong", EPOCH)
    done = training.program.run(*training.command("data.root=s3://no-such-bucket/digits"))
    assert done.code == 2
    assert done.result["error"]["field"] == "data.root"
    assert "there is no bucket" in done.result["error"]["message"]
    assert not training.run.exists()
