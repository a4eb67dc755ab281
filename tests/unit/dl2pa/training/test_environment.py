from __future__ import annotations

import pytest

from dl2pa.training import environment


def test_in_the_image_the_commit_is_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image contains no repository."""
    monkeypatch.setattr(environment, "_git", lambda *arguments: None)
    monkeypatch.setenv("DL2PA_IMAGE", "af03b7c")
    assert environment.code_version()["git_commit"] == "af03b7c"
    monkeypatch.setenv("DL2PA_IMAGE", "unknown")
    assert environment.code_version()["git_commit"] is None


def test_a_repository_commit_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_git", lambda *arguments: "5f62e10")
    monkeypatch.setenv("DL2PA_IMAGE", "af03b7c")
    assert environment.code_version()["git_commit"] == "5f62e10"
