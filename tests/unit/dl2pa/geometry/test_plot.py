"""The plot of prototypes, and the command `dl2pa prototypes`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dl2pa.cli import main
from dl2pa.geometry import build_prototypes
from dl2pa.geometry.plot import cosine_histogram, plot_prototypes


@pytest.mark.parametrize("shape", [(2, 1), (7, 2), (4, 3), (20, 10)])
def test_plot_in_every_dimension(shape: tuple[int, int], tmp_path: Path) -> None:
    path = plot_prototypes(build_prototypes(*shape), tmp_path / "a new folder" / "p.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_histogram_counts_every_pair_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = torch.randn(103, 5, generator=torch.Generator().manual_seed(0))
    expected = cosine_histogram(points)
    assert int(expected.sum()) == 103 * 102 // 2
    monkeypatch.setattr("dl2pa.geometry.certificate.BLOCK_ELEMENTS", 103 * 10)
    assert (cosine_histogram(points) - expected).abs().sum() <= 2


def test_command_accepts_the_flags_of_the_authors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "p.npy", tmp_path / "p.png"
    flags = (
        "--seed 1 --num_centroids 10 --batch_size 5 --space_dim 6 --num_epoch 9 --construction known --json"
    )
    assert main(["prototypes", *flags.split(), "--out", str(out), "--plot", str(plot)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["file"], result["plot"], result["construction"]) == (str(out), str(plot), "blocks")
    assert result["mean_norm"] < 1e-6 and out.is_file() and plot.is_file()


def test_compare_with_a_file_of_the_authors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = torch.nn.functional.normalize(torch.eye(6)[:5] + 0.1, dim=1)
    torch.save({"w": points.T.contiguous()}, tmp_path / "authors.pth")
    shape = [
        "prototypes",
        "--num-classes",
        "5",
        "--dim",
        "6",
        "--compare-with",
        str(tmp_path / "authors.pth"),
    ]
    assert main([*shape, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["beside"]["construction"] == "file"
    assert result["beside"]["max_cosine"] == pytest.approx(
        float((points @ points.T).fill_diagonal_(-1).max())
    )
    assert result["max_cosine"] == pytest.approx(-1 / 4)
    assert main(shape) == 0
    assert "-0.25" in next(line for line in capsys.readouterr().out.splitlines() if "max_cosine" in line)


def test_unknown_construction_or_file_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["prototypes", "--num-classes", "5", "--dim", "6"]
    assert main([*shape, "--construction", "authors.pth"]) == 2
    assert "--compare-with" in capsys.readouterr().err
    assert main([*shape, "--compare-with", "/nowhere/authors.pth"]) == 2


@pytest.mark.parametrize("flag", ["--out", "--plot"])
def test_unknown_output_format_is_rejected_before_the_search(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dl2pa.geometry.build_prototypes", lambda *_: pytest.fail("searched"))
    name = str(tmp_path / "p.gif")
    assert main(["prototypes", "--num-classes", "50", "--dim", "5", flag, name]) == 2


def test_geometry_does_not_import_matplotlib() -> None:
    code = "import sys, dl2pa.geometry, dl2pa.geometry.plot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
