"""Write the weights of a finished run as an MLflow model folder and log it to a server."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import shutil
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from dl2pa.rundir import MODEL, RunDirectory
from dl2pa.tracking.imports import importing
from dl2pa.tracking.spool import Event

DIGEST_TAG = "dl2pa.sha256"
MODEL_NAME = "model"
"""``runs:/RUN_ID/model`` loads it."""
_PACKAGES = ("dl2pa", "pipelines")
_WEIGHTS = Path("artifacts", MODEL)


def write_model(
    folder: Path,
    weights: Path,
    requirements: Sequence[str],
    example: bytes | None = None,
    *,
    link: bool = False,
    **identity: Any,
) -> None:
    """Write a model folder for ``mlflow models serve``.

    Args:
        folder: output folder; must not exist.
        weights: the model file.
        requirements: pinned packages that inference needs; the code of dl2pa is copied to the folder.
        example: an encoded image as input example.
        link: link to the weights instead of copying them, for a folder that is uploaded and removed.
        identity: ``model_id`` and ``run_id`` of a model that exists on a server.
    """
    with importing():
        pyfunc = importlib.import_module("mlflow.pyfunc")
        models = importlib.import_module("mlflow.models")
    model = models.Model(**identity)
    code = folder.with_name(f".{folder.name}.code")
    # An empty file, replaced by the weights below, because MLflow would copy the weights twice.
    placeholder = code / _WEIGHTS.name
    try:
        shutil.rmtree(code, ignore_errors=True)
        packages = [_copy_package(name, code) for name in _PACKAGES]
        placeholder.touch()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about missing type hints
            pyfunc.save_model(
                str(folder),
                mlflow_model=model,
                python_model=str(packages[0] / "model" / "serving.py"),
                artifacts={"model": str(placeholder)},
                code_paths=[str(path) for path in packages],
                pip_requirements=list(requirements),
                signature=_signature(models),
                input_example=_input_example(example),
            )
    finally:
        shutil.rmtree(code, ignore_errors=True)
    for cache in list(folder.rglob("__pycache__")):
        shutil.rmtree(cache)
    target = folder / _WEIGHTS
    target.unlink()
    if link:
        target.symlink_to(weights.absolute())
    else:
        shutil.copyfile(weights, target)
    model.model_size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    model.save(str(folder / "MLmodel"))


def log_model(
    client: Any,
    run_id: str,
    run_dir: Path,
    event: Event,
    check_location: Callable[[str], None] = lambda location: None,
) -> str:
    """Log the model of a spooled event to a server, once; return MLflow's id of the model.

    A model of the same run with the same weights that is already on the server is kept. If its upload was interrupted,
    it is uploaded again under the same id. May raise any error of MLflow.

    Args:
        event: ``path`` of the weights and ``example`` in the run directory, ``sha256``, ``requirements``,
            ``step``, ``params`` and ``tags``.
        check_location: raises if files may not be written to the artifact location given by the server.
    """
    with importing():
        entities = importlib.import_module("mlflow.entities")
    experiment = client.get_run(run_id).info.experiment_id
    known = [m for m in _models_of(client, experiment, run_id) if m.tags.get(DIGEST_TAG) == event["sha256"]]
    ready = [m for m in known if str(m.status) == str(entities.LoggedModelStatus.READY)]
    if ready:
        return str(ready[0].model_id)
    model = known[0] if known else _create(client, experiment, run_id, event)
    check_location(str(model.artifact_location))
    with _scratch(run_dir) as folder:
        example = run_dir / event["example"] if event["example"] else None
        write_model(
            folder,
            run_dir / event["path"],
            event["requirements"],
            example.read_bytes() if example is not None and example.is_file() else None,
            link=True,
            model_id=model.model_id,
            model_uuid=model.model_id,
            run_id=run_id,
            artifact_path=model.artifact_location,
        )
        client.log_model_artifacts(model.model_id, str(folder))
    client.log_outputs(run_id, [entities.LoggedModelOutput(model.model_id, event["step"])])
    client.finalize_logged_model(model.model_id, entities.LoggedModelStatus.READY)
    return str(model.model_id)


def _models_of(client: Any, experiment: str, run_id: str) -> list[Any]:
    """Return the models logged by a run, latest first."""
    order = [{"field_name": "creation_timestamp", "ascending": False}]
    return list(client.search_logged_models([experiment], f"source_run_id = '{run_id}'", order_by=order))


def _create(client: Any, experiment: str, run_id: str, event: Event) -> Any:
    return client.create_logged_model(
        experiment,
        name=MODEL_NAME,
        source_run_id=run_id,
        params=event["params"],
        tags={**event["tags"], DIGEST_TAG: event["sha256"]},
        model_type="image-classifier",
    )


@contextlib.contextmanager
def _scratch(run_dir: Path) -> Generator[Path]:
    """Yield a new path in the run directory and remove it afterward; a folder left by a kill is removed first."""
    folder = RunDirectory(run_dir).mlflow_model
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder / "model"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy_package(name: str, target: Path) -> Path:
    """Copy the Python files of an installed package."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations, f"{name} is not a package"
    source = Path(next(iter(spec.submodule_search_locations)))
    return Path(shutil.copytree(source, target / name, ignore=_not_sources))


def _not_sources(folder: str, names: list[str]) -> set[str]:
    return {
        n for n in names if not n.endswith(".py") and not (Path(folder, n).is_dir() and n != "__pycache__")
    }


def _signature(models: Any) -> Any:
    with importing():
        schema = importlib.import_module("mlflow.types.schema")
    kind = schema.DataType
    guess = schema.Object(
        [
            schema.Property("class", kind.string),
            schema.Property("index", kind.long),
            schema.Property("probability", kind.double),
        ]
    )
    outputs = [
        schema.ColSpec(kind.long, "class_index"),
        schema.ColSpec(kind.string, "class_name"),
        schema.ColSpec(kind.double, "probability"),
        schema.ColSpec(schema.Array(guess), "top"),
    ]
    return models.ModelSignature(
        inputs=schema.Schema([schema.ColSpec(kind.binary, "image")]),
        outputs=schema.Schema(outputs),
        params=schema.ParamSchema([schema.ParamSpec("top_k", kind.long, 5)]),
    )


def _input_example(image: bytes | None) -> Any:
    if image is None:
        return None
    with importing():
        pandas = importlib.import_module("pandas")
    return pandas.DataFrame({"image": [image]})
