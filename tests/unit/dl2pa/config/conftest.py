"""Loading of the shipped configurations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dl2pa.config import Config, load_config
from dl2pa.errors import UserError

METHODS = ("psc", "word2vec", "hpn", "ebv", "etf", "kasarla", "dnc", "goto", "dl2pa")


@pytest.fixture(autouse=True)
def no_data_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DL2PA_DATA", raising=False)


@pytest.fixture(scope="session")
def load_shipped() -> Callable[..., tuple[Config, bool]]:
    """Load a shipped configuration and return whether its method exists.

    A method that the schema does not have is replaced, so that the other keys are still validated.
    """

    def load(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, bool]:
        try:
            return load_config(path, overrides), True
        except UserError as error:
            if error.field != "method.name" or error.value not in METHODS:
                raise
        return load_config(path, [*overrides, "method.name=dl2pa"]), False

    return load
