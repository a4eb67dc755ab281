"""Input example of the logged model."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dl2pa.model.example import write_example
from dl2pa.rundir import RunDirectory
from pipelines.datasets import index_folder


def test_unreadable_validation_images_are_not_the_example(tmp_path: Path) -> None:
    folder = tmp_path / "val" / "cat"
    folder.mkdir(parents=True)
    for name, color in (("a", 0), ("b", 50), ("c", 100), ("d", 150)):
        Image.new("RGB", (8, 8), (color, color, color)).save(folder / f"{name}.png")
    content = (folder / "c.png").read_bytes()
    val = index_folder(tmp_path / "val", None, "data.root")
    (folder / "a.png").unlink()
    (folder / "b.png").write_bytes(b"no image")
    example = write_example(RunDirectory(tmp_path), val)
    assert example is not None
    assert example.read_bytes() == content
