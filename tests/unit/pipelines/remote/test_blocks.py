"""The cache of blocks: content, damage, space, and several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.remote import blocks
from pipelines.remote.blocks import BLOCK, BlockCache
from support.paths import REPOSITORY

LIMIT = 1 << 30


def content(i: int) -> bytes:
    return bytes([i % 256]) * BLOCK


def filled(folder: Path, name: str, count: int, limit: int = LIMIT) -> BlockCache:
    cache = BlockCache(folder, name, count, limit)
    for i in range(count):
        cache.write(i, content(i))
    return cache


def test_blocks_are_read_by_a_later_process(tmp_path: Path) -> None:
    filled(tmp_path, "a", 3).close()
    cache = BlockCache(tmp_path, "a", 3, LIMIT)
    assert cache.read(2, BLOCK, 10, 20) == content(2)[10:20]
    assert cache.read(2, BLOCK, 0, BLOCK) == content(2), "again, without a check of the whole block"


@pytest.mark.parametrize("damage", ["changed byte", "missing end", "data without checksum"])
def test_damaged_block_is_missing_and_can_be_written_again(tmp_path: Path, damage: str) -> None:
    """A crash of the machine may leave any of them."""
    filled(tmp_path, "a", 2).close()
    data, sums = tmp_path / "a.blocks", tmp_path / "a.sums"
    if damage == "changed byte":
        with data.open("r+b") as file:
            file.seek(BLOCK + 5)
            file.write(b"x")
    elif damage == "missing end":
        data.write_bytes(data.read_bytes()[: BLOCK + 7])
    else:
        sums.write_bytes(sums.read_bytes()[:8] + bytes(8))
    cache = BlockCache(tmp_path, "a", 2, LIMIT)
    assert cache.read(1, BLOCK, 0, 4) is None
    assert 1 not in cache
    assert cache.read(0, BLOCK, 0, 4) == content(0)[:4]
    cache.write(1, content(1))
    assert cache.read(1, BLOCK, 0, BLOCK) == content(1)


def test_cache_stays_within_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_MIN_SPARE", 0)
    monkeypatch.setattr(blocks, "_SPARE_FRACTION", 0.0)
    cache = filled(tmp_path, "a", 8, 3 * BLOCK)
    assert [i in cache for i in range(8)] == [True] * 3 + [False] * 5
    assert (tmp_path / "a.blocks").stat().st_blocks * 512 <= 3 * BLOCK + 4096


def test_unused_sets_are_removed_for_new_blocks_and_used_ones_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_MIN_SPARE", 0)
    monkeypatch.setattr(blocks, "_SPARE_FRACTION", 0.0)
    filled(tmp_path, "unused", 2).close()
    used = filled(tmp_path, "used", 2)
    cache = filled(tmp_path, "new", 3, 4 * BLOCK)
    assert [i in cache for i in range(3)] == [True, True, False]
    assert used.read(1, BLOCK, 0, 3) == content(1)[:3]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("new.blocks", "new.sums", "used.blocks", "used.sums")
    ]


def test_full_disk_costs_only_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_MIN_SPARE", 1 << 62)
    cache = filled(tmp_path, "a", 1)
    assert cache.read(0, BLOCK, 0, 1) is None


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path: Path) -> None:
    cache = filled(tmp_path / "missing", "a", 1)
    assert 0 not in cache


TWO = """
import sys
from pathlib import Path
from pipelines.remote.blocks import BLOCK, BlockCache
cache = BlockCache(Path(sys.argv[1]), "a", 64, 1 << 30)
for turn in range(3):
    for i in range(64):
        data = bytes([i]) * BLOCK
        seen = cache.read(i, BLOCK, 0, BLOCK)
        assert seen in (None, data), i
        if seen is None or turn == 0:
            cache.write(i, data)
print(sum(i in cache for i in range(64)))
"""


def test_two_processes_write_the_same_blocks(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWO, str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in started] == ["64", "64"]


def test_set_that_is_removed_at_the_same_time_by_two_is_removed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one locks the removed file, whose name a new set may have."""
    filled(tmp_path, "a", 1).close()
    lock = blocks.try_lock

    def replaced(descriptor: int) -> blocks.LockResult:
        for file in ("a.blocks", "a.sums"):
            (tmp_path / file).unlink()
        filled(tmp_path, "a", 1)
        return lock(descriptor)

    monkeypatch.setattr(blocks, "try_lock", replaced)
    assert not blocks._remove_unused(tmp_path / "a.blocks")  # pyright: ignore[reportPrivateUsage]
    assert (tmp_path / "a.blocks").exists()
