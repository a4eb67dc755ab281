from __future__ import annotations

from pathlib import Path

import pytest

from dl2pa.reporting.artifacts import Artifacts
from dl2pa.rundir import RunDirectory


def test_a_failing_artifact_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory(tmp_path)
    art = Artifacts(run)

    def fails() -> bytes:
        raise ValueError("no such color")

    art.picture("curves", fails)
    art.picture("nothing", lambda: None)
    run.per_class_csv.mkdir()
    art.text(run.per_class_csv, lambda: "text")
    art.picture("reliability", lambda: b"png")
    assert art.made == [(run.picture("reliability"), "pictures")]
    assert "could not create curves (ValueError: no such color)" in caplog.text
    assert "could not create per_class.csv" in caplog.text
