"""Import directions between packages, and commands that must not load heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("dl2pa", "launcher", "pipelines")
METHOD = ("dl2pa.geometry", "dl2pa.assignment", "dl2pa.methods", "dl2pa.backbones")
LEAVES = (
    *("dl2pa.errors", "dl2pa.envvars", "dl2pa.fence", "dl2pa.gpus", "dl2pa.osutil"),
    *("dl2pa.records", "dl2pa.redaction", "dl2pa.step_parts"),
)
ABOVE_METHOD = (
    *("dl2pa.training", "dl2pa.tracking", "dl2pa.commands", "dl2pa.config", "dl2pa.reporting"),
    *("dl2pa.model.model", "dl2pa.model.inference", "dl2pa.model.serving", "dl2pa.model.onnx_export"),
    *("pipelines", "launcher"),
)


def imports_of(file: Path) -> Iterator[str]:
    """Modules imported anywhere in a file; for `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            module = str(node.module)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def imported(package: str) -> set[tuple[str, str]]:
    """(file, module) for each import of a product package in the sources of a package."""
    place = ROOT / package.replace(".", "/")
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files, f"no sources of {package}"
    return {(str(f.relative_to(ROOT)), m) for f in files for m in imports_of(f) if within(m, PACKAGES)}


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("launcher", ("launcher", "dl2pa.config", "dl2pa.gpus", "dl2pa.rundir", "dl2pa.process", *LEAVES)),
        ("pipelines", ("pipelines", "dl2pa.step_parts", *LEAVES)),
        ("dl2pa.errors", ()),
        ("dl2pa.envvars", ()),
        ("dl2pa.specs", ("pipelines.names", "dl2pa.zoo", "dl2pa.errors")),
        ("dl2pa.zoo", ()),
        ("dl2pa.step_parts", ()),
        ("dl2pa.gpus", LEAVES),
        ("pipelines.names", ()),
        ("dl2pa.redaction", ("dl2pa.errors",)),
        ("dl2pa.fence", ("dl2pa.errors",)),
        ("dl2pa.osutil", LEAVES),
        ("dl2pa.rundir", ("dl2pa.container", *LEAVES)),
        ("dl2pa.ownership", ("dl2pa.rundir", *LEAVES)),
        ("dl2pa.constructions", ("dl2pa.errors",)),
        ("dl2pa.config", ("dl2pa.config", "dl2pa.constructions", "dl2pa.specs", *LEAVES)),
    ],
)
def test_package_imports_only_lower_layers(package: str, allowed: tuple[str, ...]) -> None:
    # `from dl2pa import errors` yields the bare name too, which loads nothing but the version.
    assert {(f, m) for f, m in imported(package) if not within(m, allowed) and m != "dl2pa"} == set()


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        *((package, ABOVE_METHOD) for package in METHOD),
        ("dl2pa.tracking", ("dl2pa.training", "dl2pa.commands", "dl2pa.reporting", "launcher", "pipelines")),
        ("dl2pa.training", ("dl2pa.reporting", "dl2pa.commands", "dl2pa.cli", "launcher")),
        ("dl2pa.reporting", ("dl2pa.commands", "dl2pa.cli", "launcher")),
    ],
)
def test_package_imports_no_higher_layer(package: str, forbidden: tuple[str, ...]) -> None:
    assert {(f, m) for f, m in imported(package) if within(m, forbidden)} == set()


def loaded_by(statement: str) -> set[str]:
    """Top-level modules (and nvidia.dali) in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


def test_command_line_help_loads_no_heavy_library() -> None:
    heavy = {
        "torch",
        "pydantic",
        "mlflow",
        "nvidia.dali",
        "numpy",
        "scipy",
        "torchvision",
        "submitit",
        "matplotlib",
    }
    assert loaded_by("import dl2pa.cli; dl2pa.cli.build_parser().format_help()") & heavy == set()


def test_importing_the_package_loads_no_other_module() -> None:
    loaded = loaded_by("import dl2pa; dir(dl2pa)")
    assert not loaded & {"torch", "numpy", "yaml", "pydantic"}
    assert {name for name in loaded if within(name, PACKAGES)} == {"dl2pa"}


def test_python_api_loads_torch_only_for_models() -> None:
    heavy = {"torch", "mlflow", "nvidia.dali", "torchvision", "submitit", "scipy"}
    assert loaded_by("import dl2pa; dl2pa.train, dl2pa.load, dl2pa.UserError") & heavy == set()


def test_launching_process_loads_no_training_library() -> None:
    """Every node of a cluster starts one at the same time."""
    heavy = {"torch", "mlflow", "nvidia.dali", "torchvision", "submitit", "scipy"}
    statement = "import dl2pa.commands.train, dl2pa.rundir, launcher.local"
    assert loaded_by(statement) & heavy == set()


STEPS_WITHOUT = """
import sys
for name in ("nvidia", "nvidia.dali", "mlflow", "submitit", "torchvision", "sklearn", "PIL"):
    sys.modules[name] = None
from pathlib import Path
from dl2pa.config import parse_config
from dl2pa.training.run import train
config = parse_config({
    "data": {"dataset": "synthetic", "num_classes": 5, "synthetic_samples": [16, 7], "image_size": 8},
    "model": {"backbone": "resnet8", "embedding_dim": 3, "widths": [4, 4, 4]},
    "train": {"epochs": 1, "batch_size": 8, "log_every_steps": 1},
    "tracking": {"enabled": False},
    "launch": {"device": "cpu", "threads": 1},
})
sys.exit(train(config, Path(sys.argv[1]), "bare"))
"""


def test_training_runs_without_optional_libraries(tmp_path: Path) -> None:
    """Two steps, an assignment update and a validation, with the imports of these libraries blocked."""
    command = [sys.executable, "-c", STEPS_WITHOUT, tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert '"num_validated": 7' in (tmp_path / "run/result.json").read_text(encoding="utf-8")


def test_importing_the_run_loads_no_optional_library() -> None:
    heavy = {"nvidia.dali", "mlflow", "submitit", "torchvision"}
    assert loaded_by("import dl2pa.training.run") & heavy == set()


def test_reading_runs_loads_neither_torch_mlflow_nor_matplotlib() -> None:
    heavy = {"torch", "nvidia.dali", "mlflow", "submitit", "torchvision", "matplotlib"}
    assert loaded_by("import dl2pa.commands.report") & heavy == set()


def test_served_model_loads_no_training_library() -> None:
    """The model in MLflow pins what these two modules import; see dl2pa/tracking/payloads.py."""
    heavy = {"scipy", "pydantic", "yaml", "torchvision", "sklearn", "matplotlib", "mlflow", "nvidia.dali"}
    loaded = loaded_by("import dl2pa.model.inference, pipelines.single")
    assert loaded & heavy == set()
    assert not any(within(module, ("dl2pa.config", "dl2pa.methods", "dl2pa.training")) for module in loaded)
