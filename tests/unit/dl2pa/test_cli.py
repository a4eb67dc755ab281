"""The command table, renamed options and shell completion."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from dl2pa.cli import COMMANDS, build_parser, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "new"),
    [
        (["sweep", "--cells", "cifar100"], "--published"),
        (["sweep", "a.yaml", "--array=train.seed=0..1"], "--grid"),
        (["prototypes", "--beside", "a.npy"], "--compare-with"),
    ],
)
def test_an_old_option_name_is_refused_with_the_new_name(
    words: list[str], new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["field"].startswith("--") and new in error["message"] and new in error["remedy"]


def test_json_is_accepted_before_and_after_a_data_action() -> None:
    parser = build_parser("data")
    for words in (["data", "--json", "index", "."], ["data", "index", ".", "--json"]):
        assert parser.parse_args(words).json
    assert not parser.parse_args(["data", "index", "."]).json


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_completion_script_names_commands_options_and_files(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", shell])
    assert caught.value.code == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("prototypes", "--compare-with", "--gpus-per-node", "final"))
    assert "--beside" not in script


def test_bash_completes_commands_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out, encoding="utf-8")
    (tmp_path / "small.yaml").touch()
    complete = """
        source ./script
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        _shtab_dl2pa dl2pa "${COMP_WORDS[COMP_CWORD]}"
        echo "${COMPREPLY[@]}"
    """

    def completions(*words: str) -> list[str]:
        command = ["bash", "-c", complete, "bash", "dl2pa", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completions("pro") == ["prototypes"]
    assert completions("train", "sm") == ["small.yaml"]
