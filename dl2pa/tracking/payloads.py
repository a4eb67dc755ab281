"""Content sent to MLflow for a run: tags, data sets, and the fields of the logged model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from dl2pa.config import Config, fingerprint
from dl2pa.config.identity import RECIPE_TAG, group_name
from dl2pa.osutil import sha256_of
from dl2pa.redaction import redact
from dl2pa.rundir import RunDirectory
from dl2pa.specs import backbone_spec
from dl2pa.tracking.description import NOTE_TAG, describe_run

_SERVING_PACKAGES = ("mlflow", "numpy", "pandas", "pillow", "safetensors", "torch")


def run_tags(
    config: Config, name: str, environment: Mapping[str, Any], num_classes: int, data_fingerprint: str
) -> dict[str, str]:
    """Tags to search runs by, with the description of a run that has no result yet.

    Args:
        name: name of the configuration.
        environment: description of the current attempt's environment.
    """
    commit = environment["git_commit"]
    return {
        RECIPE_TAG: name,
        "group": group_name(config),
        NOTE_TAG: describe_run(config, name, environment["command"]),
        "method": config.method.name,
        "loss": config.loss,
        "assignment": config.assignment,
        "backbone": config.model.backbone,
        "dataset": config.data.dataset,
        "imbalance": "none" if config.data.imbalance is None else f"{config.data.imbalance:g}",
        "num_classes": str(num_classes),
        "dim": str(config.model.embedding_dim),
        "seed": str(config.train.seed),
        "precision": config.train.precision,
        "dl2pa.data": data_fingerprint,
        "dl2pa.fingerprint": fingerprint(config),
        "dl2pa.world_size": str(environment["world_size"]),
        "mlflow.source.name": f"dl2pa train {name}",
        "mlflow.source.type": "LOCAL",
        **({"mlflow.source.git.commit": commit} if commit else {}),
        **{f"env.{k}": str(v) for k, v in environment.items() if v is not None},
        **{k: redact(v) for k, v in config.tracking.tags.items()},
    }


def dataset_payload(
    config: Config,
    context: str,
    *,
    images: int,
    classes: int,
    counts: Sequence[int] | None,
    digest: str,
    root: Any,
) -> dict[str, str]:
    """Fields of one MLflow data set.

    Args:
        context: `training` or `validation`.
        counts: images per class; None for synthetic data.
        digest: fingerprint of the data set; changes with any file, label or pixel.
        root: folder of the data set; None if it has no folder of its own.
    """
    data = config.data
    profile: dict[str, Any] = {"images": images, "classes": classes}
    if counts is not None:
        profile |= {"fewest_of_a_class": min(counts), "most_of_a_class": max(counts)}
    if data.imbalance is not None and context == "training":
        profile["imbalance"] = data.imbalance
    return {
        "name": f"{data.dataset} {context}",
        "digest": digest[:36],
        "context": context,
        "source": json.dumps({"uri": str(root or data.root or data.dataset)}),
        "profile": json.dumps(profile),
    }


def model_payload(run: RunDirectory, config: Config, result: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that ``dl2pa.tracking.model.log_model`` takes, without ``example``.

    Args:
        result: result of the finished run.
    """
    params = {
        "method": config.method.name,
        "backbone": config.model.backbone,
        "dim": config.model.embedding_dim,
        "dataset": config.data.dataset,
        "num_classes": result["num_classes"],
        "image_size": config.data.image_size,
        "seed": config.train.seed,
        "temperature": result.get("temperature") or 1.0,
    }
    tagged = ("top1_last", "top5_last", "ece_last", "ece_calibrated")
    return {
        "path": run.model.name,
        "sha256": sha256_of(run.model),
        "step": result["steps"],
        "requirements": serving_requirements(config.model.backbone),
        "params": {key: str(value) for key, value in params.items()},
        "tags": {f"dl2pa.{key}": f"{result[key]:.2f}" for key in tagged if result.get(key) is not None},
    }


def serving_requirements(backbone: str) -> list[str]:
    """Packages that inference needs, pinned to the installed versions; dl2pa's own code is in the logged model."""
    family = backbone_spec(backbone).family
    if family in ("cifar", "vector"):
        libraries: tuple[str, ...] = ()
    else:
        libraries = tuple(dict.fromkeys((family, "torchvision")))
    pinned: list[str] = []
    for package in sorted((*_SERVING_PACKAGES, *libraries)):
        try:
            # Package indexes lack local suffixes such as +cu130.
            version = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
        pinned.append(f"{package}=={version}")
    return pinned
