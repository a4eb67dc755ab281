"""Errors that need only the command line and its files are found before torch, DALI and MLflow are imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[4]
CONFIG = """
data: {dataset: synthetic, num_classes: 10, image_size: 32, synthetic_samples: [64, 16]}
model: {backbone: resnet8, embedding_dim: 4}
optim: {}
method: {}
train: {epochs: 1, batch_size: 16}
launch: {device: cpu}
tracking: {uri: none}
"""
FOLDER = "data.dataset=imagefolder"
FEATURES = ("data.dataset=features", "data.num_classes=")
ROWS: list[tuple[str, list[str]]] = [
    ("data.root", ["train", "c.yaml", FOLDER, "data.root=gone"]),
    ("data.root", ["train", "c.yaml", FOLDER, "data.root=broken"]),
    ("data.classes", ["train", "c.yaml", FOLDER, "data.root=images", "data.classes=[cat]"]),
    ("data.num_classes", ["train", "c.yaml", FOLDER, "data.root=images"]),
    ("data.root", ["train", "c.yaml", "data.dataset=cifar10", "data.crop=pad", "data.root=gone"]),
    ("data.root", ["train", "c.yaml", FOLDER, "data.root=gone", "--nproc", "2"]),
    ("method.name", ["train", "c.yaml", "method.name=dlpa"]),
    ("train.epoch", ["train", "c.yaml", "train.epoch=2"]),
    ("train.batch_size", ["train", "c.yaml", "train.batch_size=128"]),
    ("launch.nproc", ["train", "c.yaml", "--nproc", "3"]),
    ("launch.backend", ["train", "c.yaml", "launch.backend=nccl", "--nproc", "2"]),
    ("train.sync_bn", ["train", "c.yaml", "train.sync_bn=true", "--nproc", "2"]),
    ("model.embedding_dim", ["train", "c.yaml", "model.embedding_dim=1"]),
    ("model.backbone", ["train", "c.yaml", "model.backbone=resnet19"]),
    ("model.backbone", ["train", "c.yaml", "model.backbone=timm:resnet19"]),
    ("model.init", ["train", "c.yaml", "model.init=gone"]),
    ("model.init", ["train", "c.yaml", "model.init=started"]),
    ("model.init", ["train", "c.yaml", "model.init=torchvision:DEFAULT"]),
    ("data.root", ["train", "c.yaml", "model.init=finished", FOLDER, "data.root=gone"]),
    ("method.prototypes", ["train", "c.yaml", "method.prototypes=gone.npy"]),
    ("method.prototypes", ["train", "c.yaml", "method.prototypes=c.yaml"]),
    ("method.prototypes", ["train", "c.yaml", "method.prototypes=small.npy"]),
    ("method.prototypes", ["train", "c.yaml", "method.prototypes=simplex"]),
    ("method.class_vectors", ["train", "c.yaml", "method.class_vectors=gone.npy"]),
    ("method.class_vectors", ["train", "c.yaml", "method.class_vectors=small.npy"]),
    ("method.class_vectors", ["train", "c.yaml", "method.class_vectors=texts.npy"]),
    ("run-dir", ["train", "c.yaml", "--run-dir", "c.yaml"]),
    ("data.root", ["train", "c.yaml", *FEATURES, "data.root=gone", "model.backbone=mlp"]),
    ("model.backbone", ["train", "c.yaml", *FEATURES, "data.root=gone"]),
    ("model.backbone", ["train", "c.yaml", "model.backbone=identity"]),
    ("data.root", ["features", "c.yaml", FOLDER, "data.root=gone", "--out", "f"]),
    ("data.dataset", ["features", "c.yaml", *FEATURES, "--out", "f"]),
    ("data.dataset", ["features", "c.yaml", "data.dataset=nomodule:f", "data.num_classes=", "--out", "f"]),
    ("--out", ["features", "c.yaml", "--out", "c.yaml"]),
    ("--nproc", ["features", "c.yaml", "--out", "f", "--nproc", "0"]),
    ("data.root", ["submit", "c.yaml", FOLDER, "data.root=gone"]),
    ("method.prototypes", ["submit", "c.yaml", "method.prototypes=gone.npy"]),
    ("model.init", ["submit", "c.yaml", "model.init=gone"]),
    ("launch.device", ["submit", "c.yaml", "launch.device=cuda", "--gpus-per-node", "0"]),
    ("train.seed", ["submit", "c.yaml", "--run-dir", "started", "train.seed=1"]),
    ("data.root", ["resume", "submitted", FOLDER, "data.root=gone"]),
    ("train.epochs", ["resume", "submitted", "train.epochs=many"]),
    ("model.init", ["resume", "submitted", "model.init=gone"]),
    ("job", ["resume", "gone"]),
    ("data.root", ["sweep", "c.yaml", FOLDER, "data.root=gone", "--seeds", "0..1"]),
    ("method.prototypes", ["sweep", "c.yaml", "method.prototypes=gone.npy", "--seeds", "0..1"]),
    ("model.init", ["sweep", "c.yaml", "model.init=gone", "--seeds", "0..1"]),
    ("file", ["search", "c.yaml"]),
    ("run", ["evaluate", "gone"]),
    ("run", ["evaluate", "started"]),
    ("run", ["evaluate", "submitted", "--checkpoint", "latest"]),
    ("optim.lr", ["evaluate", "finished", "optim.lr=1"]),
    ("data.root", ["evaluate", "finished", FOLDER, "data.root=gone"]),
    ("data.root", ["evaluate", "finished", FOLDER, "data.root=gone", "--embedding"]),
    ("--set", ["evaluate", "finished", "--set", "x=gone"]),
    ("--ood", ["evaluate", "finished", "--ood", "gone"]),
    ("--nproc", ["evaluate", "finished", "--nproc", "0"]),
    ("model", ["predict", "gone", "c.yaml"]),
    ("image", ["predict", "finished", "gone.png"]),
    ("image", ["predict", "finished", "c.yaml"]),
    ("--top", ["predict", "finished", "c.yaml", "--top", "0"]),
    ("image", ["predict", "finished", "gone/*.png"]),
    ("image", ["predict", "finished", "@gone.txt", "--out", "p.csv"]),
    ("--out", ["predict", "finished", "images", "--out", "p.json"]),
    ("run", ["predict", "submitted", "images", "--checkpoint", "latest"]),
    ("model", ["embed", "gone", "images", "--out", "e.npz"]),
    ("--out", ["embed", "finished", "images", "--out", "e.csv"]),
    ("run", ["export", "gone"]),
    ("run", ["export", "started"]),
    ("--out", ["export", "finished", "--out", "c.yaml/out"]),
    ("run", ["register", "started", "--name", "model"]),
    ("ROOT", ["data", "index", "gone"]),
    ("ROOT", ["data", "pack", "gone", "out"]),
    ("--quality", ["data", "pack", "images", "out", "--quality", "0"]),
    ("--construction", ["prototypes", "--num-classes", "9", "--dim", "4", "--construction", "best"]),
    ("--construction", ["prototypes", "--num-classes", "9", "--dim", "4", "--construction", "simplex"]),
    ("--dim", ["prototypes", "--num-classes", "9", "--dim", "0"]),
    ("--num-classes", ["prototypes", "--num-classes", "1", "--dim", "4"]),
    ("--out", ["prototypes", "--num-classes", "9", "--dim", "4", "--out", "x.txt"]),
    ("--out", ["prototypes", "--num-classes", "9", "--dim", "4", "--out", "c.yaml/x.npy"]),
    ("--plot", ["prototypes", "--num-classes", "9", "--dim", "4", "--plot", "x.txt"]),
    ("--plot", ["prototypes", "--num-classes", "9", "--dim", "4", "--plot", "c.yaml/x.png"]),
    ("--compare-with", ["prototypes", "--num-classes", "9", "--dim", "4", "--compare-with", "gone.npy"]),
    ("--devices", ["estimate", "c.yaml", "--devices", "0"]),
    ("--link", ["estimate", "c.yaml", "--link", "nan"]),
    ("--markdown", ["config", "c.yaml", "--markdown"]),
    ("data.root", ["estimate", "c.yaml", FOLDER, "data.root=gone"]),
    ("--models", ["bench", "train", "--models", "resnet19"]),
    ("--loaders", ["bench", "train", "--models", "resnet50", "--loaders", "resident"]),
    ("--data", ["bench", "train", "--models", "resnet50", "--loaders", "dali"]),
    ("--precision", ["bench", "train", "--precision", "fp64"]),
    ("--rounds", ["bench", "train", "--rounds", "0"]),
    ("--loaders", ["bench", "pipeline", "--loaders", "dali"]),
    ("--data", ["bench", "pipeline", "--data", "gone"]),
    ("--classes", ["bench", "matching", "--classes", "1"]),
    ("--step-ms", ["bench", "scaling", "--step-ms", "0"]),
    ("--models", ["bench", "classes", "--models", "resnet8,resnet50"]),
    ("model.init", ["estimate", "c.yaml", "model.init=gone"]),
    ("model.init", ["config", "c.yaml", "model.init=gone"]),
    ("model.backbone", ["weights", "list", "resnet19"]),
    ("weights", ["weights", "fetch", "torchvision:resnet19"]),
    ("DIR", ["init", "gone"]),
    ("--out", ["init", "images", "--out", "c.yaml"]),
    ("--init", ["init", "images", "--init", "gone"]),
]
"""Field of the error and command, in a folder made by ``folder``."""

RUN_ALL = """
import contextlib, io, json, sys
from dl2pa.cli import main
results = []
for command in json.loads(sys.stdin.read()):
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        code = main([*command, "--json"])
    heavy = [m for m in ("torch", "nvidia.dali", "mlflow", "torchvision", "scipy", "matplotlib") if m in sys.modules]
    results.append([code, json.loads(output.getvalue().splitlines()[-1]), heavy])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")

    def write(name: str, text: str = "") -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

    write("c.yaml", CONFIG)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write(f"images/{split}/{name}/1.png")
    (folder / "broken" / "train" / "cat").mkdir(parents=True)
    for run in ("started", "submitted", "finished"):
        write(f"{run}/config.yaml", CONFIG)
        write(f"{run}/status.json", "{}")
    write("started/checkpoints/step-000000002/COMPLETE", "{}")
    write("submitted/slurm/config.yaml", CONFIG)
    write(
        "submitted/slurm/job.json", json.dumps({"job_id": "7", "log": "x", "name": "c", "cwd": str(folder)})
    )
    write("finished/model.safetensors", "damaged")
    np.save(folder / "small.npy", np.eye(3, 4, dtype=np.float32))
    np.save(folder / "texts.npy", np.array([["a"]] * 10))
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[Any]:
    """Exit code, JSON output and heavy modules after each command, all in one process."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    commands = json.dumps([command for _, command in ROWS])
    command = [sys.executable, "-c", RUN_ALL]
    done = subprocess.run(
        command, input=commands, capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[" ".join(command) for _, command in ROWS])
def test_a_user_error_is_reported_without_heavy_imports(number: int, results: list[Any]) -> None:
    code, output, heavy = results[number]
    assert (code, output["error"]["field"]) == (2, ROWS[number][0]), output
    assert heavy == []
