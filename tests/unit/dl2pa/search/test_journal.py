"""Journal of a search: what a kill leaves, a second process, and damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from dl2pa.errors import TrainingFailure, UserError
from dl2pa.osutil import LockResult
from dl2pa.records import DamagedFile
from dl2pa.search.journal import JOURNAL, Header, Journal, State, read_state

HEADER = Header("0" * 32, "lr", "/config.yaml", ("train.epochs=3",), "0123456789", {"metric": "top1"})


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """A search with one finished, one pruned and one open trial."""
    journal = Journal(tmp_path)
    journal.begin(HEADER)
    for lr in (0.1, 0.2, 0.3):
        journal.start({"optim.lr": lr}, {})
    first, second, _ = journal.state.trials
    journal.report(first, 1, 50.0, prune=False, attrs={"completed_rung_0": 50.0})
    journal.report(second, 1, 40.0, prune=True, attrs={"completed_rung_0": 40.0})
    journal.end(first, "finished", value=90.0, epoch=3, steps=30, total_steps=30)
    journal.end(second, "pruned", value=40.0, epoch=1, steps=11, total_steps=30)
    return journal


def test_a_journal_is_read_as_it_was_written(journal: Journal, tmp_path: Path) -> None:
    assert read_state(tmp_path) == journal.state
    first, second, third = journal.state.trials
    assert (first.state, first.value, first.steps) == ("finished", 90.0, 30)
    assert (second.prune, second.reports, second.attrs) == (True, [(1, 40.0)], {"completed_rung_0": 40.0})
    assert journal.state.open() == [third]
    assert journal.state.counts() == {"finished": 1, "pruned": 1, "failed": 0, "open": 1}
    assert journal.state.header == HEADER


def test_a_line_that_a_kill_has_truncated_is_written_again(journal: Journal, tmp_path: Path) -> None:
    journal.close()
    path = tmp_path / JOURNAL
    whole = path.read_bytes()
    last = len(whole[:-1]) - whole[:-1].rfind(b"\n")
    for length in range(1, last):
        path.write_bytes(whole[:-length])
        again = Journal(tmp_path)
        second = again.state.trials[1]
        assert second.state == "open" and second.prune
        again.end(second, "pruned", value=40.0, epoch=1, steps=11, total_steps=30)
        again.close()
        assert read_state(tmp_path).trials == journal.state.trials


def test_a_second_process_is_refused(journal: Journal, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another process runs this search"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()


def test_a_journal_that_another_process_has_changed_is_not_written(journal: Journal, tmp_path: Path) -> None:
    """As on a file system without locks."""
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"e": "trial", "number": 3, "params": {}, "attrs": {}}\n')
    before = (tmp_path / JOURNAL).read_bytes()
    with pytest.raises(TrainingFailure, match="changed by another process"):
        journal.start({"optim.lr": 0.4}, {})
    assert (tmp_path / JOURNAL).read_bytes() == before


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"e": "pause"}',
        '{"e": "trial", "number": 4, "params": {}, "attrs": {}}',
        '{"e": "trial", "number": 3, "params": [], "attrs": {}}',
        '{"e": "end", "number": 0, "state": "finished"}',
        '{"e": "end", "number": 2, "state": "lost"}',
        '{"e": "report", "number": 2, "epoch": 1, "value": "high", "prune": false, "attrs": {}}',
        '{"e": "report", "number": 9, "epoch": 1, "value": 1.0, "prune": false, "attrs": {}}',
        '{"e": "search", "id": "", "name": "", "config": "", "overrides": [], "fingerprint": "", "keys": {}}',
    ],
)
def test_a_damaged_line_is_named(line: str, journal: Journal, tmp_path: Path) -> None:
    journal.close()
    with (tmp_path / JOURNAL).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DamagedFile, match="line 9") as caught:
        Journal(tmp_path)
    assert caught.value.value == str(tmp_path / JOURNAL)


def test_the_best_trial_is_the_first_of_equal_finished_ones() -> None:
    state = State()
    state.apply({"e": "search", **vars(HEADER)})
    for number, (outcome, value) in enumerate([("pruned", 99.0), ("finished", 80.0), ("finished", 80.0)]):
        state.apply({"e": "trial", "number": number, "params": {}, "attrs": {}})
        state.apply({"e": "end", "number": number, "state": outcome, "value": value})
    best, lowest = state.best(maximize=True), state.best(maximize=False)
    assert best is not None and best.number == 1
    assert lowest is not None and lowest.number == 1


def test_a_search_starts_while_another_process_looks_whether_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`is_running` holds the lock for a moment."""
    results = iter([LockResult.HELD, LockResult.ACQUIRED])
    monkeypatch.setattr("dl2pa.search.journal.try_lock", lambda descriptor: next(results))
    Journal(tmp_path).close()
