from __future__ import annotations

import pytest

from dl2pa.training import environment


def test_an_image_knows_the_commit_it_was_built_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no repository in it."""
    monkeypatch.setattr(environment, "_git", lambda *arguments: None)
    monkeypatch.setenv("DL2PA_IMAGE", "af03b7c")
    assert environment.code_version()["git_commit"] == "af03b7c"
    monkeypatch.setenv("DL2PA_IMAGE", "unknown")
    assert environment.code_version()["git_commit"] is None


def test_a_repository_s_own_commit_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_git", lambda *arguments: "5f62e10")
    monkeypatch.setenv("DL2PA_IMAGE", "af03b7c")
    assert environment.code_version()["git_commit"] == "5f62e10"
