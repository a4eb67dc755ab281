from __future__ import annotations

from pathlib import Path

import pytest

from dl2pa.reporting.artifacts import Artifacts
from dl2pa.rundir import RunDirectory


def test_what_cannot_be_drawn_or_written_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    art = Artifacts(RunDirectory(tmp_path))

    def fails() -> bytes:
        raise ValueError("no such color")

    art.picture("curves", fails)
    art.picture("nothing", lambda: None)
    (tmp_path / "per_class.csv").mkdir()
    art.text("per_class.csv", lambda: "a folder is in the way")
    art.picture("reliability", lambda: b"png")
    assert art.made == [(tmp_path / "pictures" / "reliability.png", "pictures")]
    assert "curves could not be made (ValueError: no such color)" in caplog.text
    assert "per_class.csv could not be made" in caplog.text
