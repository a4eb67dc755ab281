"""The wheel contains every file of the packages."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from dl2pa.errors import install_command

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, SETTINGS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
TYPED = ("dl2pa", "launcher", "pipelines")


def packaged(package: str) -> set[Path]:
    """Files that the package-data patterns of pyproject.toml select, for a package and those inside it."""
    data: dict[str, list[str]] = SETTINGS["package-data"]
    folders = {ROOT / name.replace(".", "/"): patterns for name, patterns in data.items()}
    inside = {
        folder: patterns for folder, patterns in folders.items() if folder.is_relative_to(ROOT / package)
    }
    return {
        file for folder, patterns in inside.items() for pattern in patterns for file in folder.glob(pattern)
    }


def data_files(package: str) -> Iterator[Path]:
    """Files of a package that are neither Python nor compiled Python."""
    for file in (ROOT / package).rglob("*"):
        if file.is_file() and file.suffix not in (".py", ".pyc"):
            yield file


@pytest.mark.parametrize("package", [*TYPED, "configs"])
def test_package_data_covers_all_non_python_files(package: str) -> None:
    missing = set(data_files(package)) - packaged(package)
    assert {str(file.relative_to(ROOT)) for file in missing} == set(), (
        "add them to package-data in pyproject.toml"
    )


def test_extras_are_installed_by_one_command_everywhere() -> None:
    extras = set(PROJECT["optional-dependencies"])
    named: set[str] = set()
    for file in (f for place in ("docs", "configs", "dl2pa", "pipelines") for f in (ROOT / place).rglob("*")):
        if file.suffix not in (".md", ".yaml", ".py"):
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            named |= set(re.findall(r"install_command\('(\w+)'\)", line))
            if "pip install" in line and "{" not in line and (shown := re.findall(r"\[(\w+)\]['\"]", line)):
                assert all(install_command(extra) in line for extra in shown), f"{file}: {line}"
                named |= set(shown)
    assert {"timm", "s3", "onnx", "search"} <= named <= extras


def test_package_data_patterns_match_files() -> None:
    for name, patterns in SETTINGS["package-data"].items():
        for pattern in patterns:
            assert any((ROOT / name.replace(".", "/")).glob(pattern)), f"{name}: {pattern}"


@pytest.mark.parametrize("package", TYPED)
def test_every_folder_with_python_files_is_a_package(package: str) -> None:
    folders = {file.parent for file in (ROOT / package).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
    patterns = SETTINGS["packages"]["find"]["include"]
    assert any(fnmatchcase(f"{package}.subpackage", pattern) for pattern in patterns)
    assert (ROOT / package / "py.typed").is_file()
