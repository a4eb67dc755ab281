"""Rank variables in the environment, complete, incomplete and left over from another program."""

from __future__ import annotations

import os

import pytest

from dl2pa import envvars
from dl2pa.errors import UserError
from dl2pa.process import Ranks, environment_without_ranks, torchrun_ranks

COMPLETE = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*COMPLETE, envvars.STORE):
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_complete_variables_give_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchrun_ranks() is None
    set_all(monkeypatch, COMPLETE)
    assert torchrun_ranks() == Ranks(1, 4, 1, 2)


def test_address_variables_alone_describe_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"MASTER_ADDR": "head", "MASTER_PORT": "1"})
    assert torchrun_ranks() is None


def test_store_replaces_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {name: COMPLETE[name] for name in envvars.RANKS} | {envvars.STORE: "/a"})
    assert torchrun_ranks() == Ranks(1, 4, 1, 2)


@pytest.mark.parametrize("missing", COMPLETE)
def test_incomplete_variables_are_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {name: value for name, value in COMPLETE.items() if name != missing})
    with pytest.raises(UserError) as refused:
        torchrun_ranks()
    error = refused.value
    present = [name for name in envvars.RANKS if name != missing]
    assert (error.field, missing in error.message) == ("environment", True)
    assert all(f"{name}={COMPLETE[name]}" in error.value for name in present)
    assert f"unset {' '.join(present)}`" in error.remedy


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": "4"},
        {"RANK": "-1"},
        {"LOCAL_RANK": "2"},
        {"LOCAL_WORLD_SIZE": "5"},
        {"RANK": "0"},
        {"RANK": "one"},
        {"WORLD_SIZE": ""},
    ],
)
def test_impossible_values_are_refused(changes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, COMPLETE | changes)
    with pytest.raises(UserError, match="unset RANK"):
        torchrun_ranks()


def test_environment_of_a_sweep_run_has_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, COMPLETE)
    expected = {name: value for name, value in os.environ.items() if name not in envvars.RANKS}
    assert environment_without_ranks() == expected
