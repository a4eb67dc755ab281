"""Visible GPUs and the number of processes per machine, on machines with faked device files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dl2pa import gpus
from dl2pa.cli import main
from dl2pa.config import dump_config, load_config, load_recorded_config
from dl2pa.config.checks import check_batches
from dl2pa.config.identity import checkpoint_identity, run_identity
from dl2pa.config.load import fingerprint
from dl2pa.errors import UserError
from dl2pa.gpus import resolve_nproc, visible_gpus
from dl2pa.runplan import RunSpec, plan_runs

ROOT = Path(__file__).resolve().parents[3]
Machine = Callable[[int, str | None], None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Simulate a machine: the number of its GPUs and CUDA_VISIBLE_DEVICES."""

    def make(count: int, visible: str | None) -> None:
        devices = tmp_path / "dev"
        devices.mkdir()
        (devices / "nvidiactl").touch()
        for index in range(count):
            (devices / f"nvidia{index}").touch()
        monkeypatch.setattr(gpus, "DEVICE_FILES", devices)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return make


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    text = "data: {dataset: synthetic, num_classes: 5}\ntrain: {batch_size: 12}\n"
    Path("small.yaml").write_text(text, encoding="utf-8")
    return Path("small.yaml")


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [
        (0, None, []),
        (3, None, ["0", "1", "2"]),
        (4, "2,3", ["2", "3"]),
        (4, " 1 , 0 ", ["1", "0"]),
        (4, "", []),
        (4, "-1", []),
        (4, "NoDevFiles", []),
        (4, "0,-1,2", ["0"]),
        (2, "0,1,2", ["0", "1"]),
        (4, "1,1", []),
        (0, "0,1", []),
        (4, "GPU-aa,GPU-bb", ["GPU-aa", "GPU-bb"]),
        (1, "MIG-aa,MIG-bb", ["MIG-aa"]),
    ],
)
def test_visible_gpus_follow_cuda(
    count: int, visible: str | None, expected: list[str], machine: Machine
) -> None:
    machine(count, visible)
    assert visible_gpus() == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every file")
def test_a_gpu_without_permission_is_not_counted(machine: Machine) -> None:
    machine(2, None)
    (gpus.DEVICE_FILES / "nvidia1").chmod(0)
    assert visible_gpus() == ["0"]


@pytest.mark.parametrize(
    ("nproc", "device", "count", "expected"),
    [
        ("auto", "auto", 4, 4),
        ("auto", "cuda", 4, 4),
        ("auto", "cpu", 4, 1),
        ("auto", "auto", 0, 1),
        (3, "auto", 4, 3),
        (3, "cpu", 0, 3),
    ],
)
def test_auto_is_one_process_per_gpu(
    nproc: int, device: str, count: int, expected: int, machine: Machine
) -> None:
    machine(count, None)
    assert resolve_nproc(nproc, device) == expected  # pyright: ignore[reportArgumentType]


def test_a_plan_resolves_auto_and_records_it(config_file: Path, machine: Machine, tmp_path: Path) -> None:
    machine(4, None)
    (plan,) = plan_runs([RunSpec(config_file, ())], None)
    assert (plan.nproc, plan.config.launch.nproc) == (4, "auto")
    recorded = tmp_path / "config.yaml"
    recorded.write_text(dump_config(plan.config), encoding="utf-8")
    assert load_recorded_config(recorded).launch.nproc == "auto"
    (plan,) = plan_runs([RunSpec(config_file, ("launch.nproc=2",))], None, nproc="auto")
    assert (plan.nproc, plan.config.launch.nproc) == (4, "auto")
    (plan,) = plan_runs([RunSpec(config_file, ("launch.nproc=2",))], None)
    assert (plan.nproc, plan.config.launch.nproc) == (2, 2)


@pytest.mark.parametrize(
    ("override", "requested", "expected"), [("auto", 8, 8), ("2", 8, 8), ("auto", 0, 1), ("2", 0, 2)]
)
def test_a_job_starts_a_process_per_requested_gpu(
    override: str, requested: int, expected: int, config_file: Path, machine: Machine
) -> None:
    machine(4, None)
    (plan,) = plan_runs([RunSpec(config_file, (f"launch.nproc={override}",))], None, gpus=requested)
    assert (plan.nproc, plan.config.launch.nproc) == (expected, expected)


def test_auto_does_not_change_the_identity_of_a_run(config_file: Path) -> None:
    auto, two = (load_config(config_file, [f"launch.nproc={n}"]) for n in ("auto", 2))
    assert fingerprint(auto) == fingerprint(two)
    assert run_identity(auto) == run_identity(two)
    assert checkpoint_identity(auto) == checkpoint_identity(two)


def test_a_batch_that_auto_does_not_divide_is_refused_with_the_number(config_file: Path) -> None:
    with pytest.raises(
        UserError, match=r"launch\.nproc=auto: one process per GPU.*does not divide"
    ) as refused:
        check_batches(load_config(config_file, []), 5)
    assert (refused.value.field, refused.value.value) == ("launch.nproc", 5)


@pytest.mark.parametrize(("nproc", "count"), [("5", 8), ("auto", 5)])
def test_train_resolves_auto_and_names_idle_gpus(
    nproc: str, count: int, config_file: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(count, None)
    assert main(["train", str(config_file), "--nproc", nproc, "--json"]) == 2
    error = capsys.readouterr().err
    assert "launch.nproc=5" in error
    assert ("3 of 8 visible GPUs stay idle" in error) == (nproc == "5")


@pytest.mark.skipif(bool(visible_gpus()), reason="needs a machine without a GPU")
@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "configs/imagenet1k").glob("*.yaml")])
def test_imagenet_configurations_refuse_to_train_on_a_cpu(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["data.dataset=synthetic", "data.loader=synthetic", "train.batch_size=4"]
    config, run = ROOT / f"configs/imagenet1k/{name}.yaml", tmp_path / "run"
    assert main(["train", str(config), *images, "--run-dir", str(run)]) == 2
    assert "launch.device=cpu" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["balanced", "longtail"])
def test_recipes_with_small_batches_keep_batchnorm_in_one_process(folder: str) -> None:
    """Each process has its own BatchNorm statistics; eight of 16 images are another recipe."""
    files = sorted((ROOT / "configs" / folder).glob("*.yaml"))
    assert files and {load_config(file, []).launch.nproc for file in files} == {1}
