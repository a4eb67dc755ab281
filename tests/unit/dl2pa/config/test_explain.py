from __future__ import annotations

import json
from pathlib import Path

import pytest

from dl2pa.cli import main
from dl2pa.config import Config, flatten
from dl2pa.config.explain import Key, as_markdown, explain

PAGE = Path(__file__).resolve().parents[4] / "docs/configuration.md"
KEYS = explain("")


def test_the_reference_covers_every_key_with_its_default() -> None:
    assert {key.name: key.default for key in KEYS} == flatten(Config())


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_every_key_has_a_type_and_a_description(key: Key) -> None:
    assert key.type
    assert key.description.endswith(".")


def test_the_documentation_page_is_current() -> None:
    command = "python -m dl2pa config --explain --markdown > docs/configuration.md"
    assert PAGE.read_text(encoding="utf-8") == as_markdown(), f"run: {command}"


def test_the_command_prints_the_documentation_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--explain", "--markdown"]) == 0
    assert capsys.readouterr().out == as_markdown()


def test_a_key_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--explain", "optim.lr"]) == 0
    name, kind, default, description = capsys.readouterr().out.splitlines()
    assert (name, kind, default) == ("optim.lr", "  type:    number > 0", "  default: 0.5")
    assert "learning rate" in description


def test_a_section_is_explained_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--explain", "checkpoint", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert list(tree) == [
        f"checkpoint.{name}" for name in ("every_epochs", "every_steps", "keep", "keep_best")
    ]
    assert tree["checkpoint.keep"]["default"] == 2
    assert tree["checkpoint.keep_best"]["allowed"] == [True, False]


@pytest.mark.parametrize(("name", "near"), [("optim.l", "optim.lr"), ("lr", "optim.lr"), ("opt", "optim")])
def test_an_unknown_key_exits_with_2_and_near_names(
    name: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "--explain", name]) == 2
    assert near in capsys.readouterr().err


def test_a_configuration_is_required_without_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 2
    assert "CONFIG is missing" in capsys.readouterr().err
