"""`dl2pa export`: write a run's model as a self-contained folder."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dl2pa.commands.options import add_checkpoint, add_run, check_output_folder, nonempty_path
from dl2pa.commands.output import note, say
from dl2pa.errors import UserError
from dl2pa.osutil import replacing, write_atomically
from dl2pa.rundir import MODEL, RunDirectory

if TYPE_CHECKING:
    from torch import Tensor

    from dl2pa.config import Config
    from dl2pa.model.inference import Classifier

_CHECKED = 64
"""Number of images on which the ONNX model is compared with the original."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--out", type=nonempty_path, metavar="DIR", help="folder to write (default: RUN/export)"
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--onnx", action="store_true", help="also write model.onnx and compare it with the original"
    )
    parser.add_argument(
        "--mlflow", action="store_true", help="also write mlflow/, for `mlflow models serve -m`"
    )


def run(args: argparse.Namespace) -> int:
    from dl2pa.model.onnx_packages import check_installed
    from dl2pa.recorded_run import check_weights, load_run_config

    config = load_run_config(args.run, ())
    if args.onnx:
        check_installed()
    out = args.out or RunDirectory(args.run).export
    check_weights(args.run, args.checkpoint)
    check_output_folder("--out", out)
    if RunDirectory(out).config.is_file():
        remedy = f"Choose another folder, as in {RunDirectory(args.run).export}."
        raise UserError("--out", str(out), "is a run directory, whose model would be replaced", remedy)

    # These import torch, so they come after the checks.
    from dl2pa.model.compose import join_frozen
    from dl2pa.model.inference import load_classifier
    from dl2pa.model.saved import write_classifier
    from dl2pa.training.weights import model_file

    source = model_file(args.run, config, args.checkpoint)
    classifier = load_classifier(source)
    joined = classifier.takes_features
    if joined:
        classifier = join_frozen(classifier, config)
    target = out / MODEL
    try:
        out.mkdir(parents=True, exist_ok=True)
        if joined:
            write_classifier(target, classifier)
        elif target.resolve() != source.resolve():
            with replacing(target, source.stat().st_size) as temporary:
                shutil.copyfile(source, temporary)
        description = json.dumps(classifier.description, indent=1) + "\n"
        write_atomically(out / "model.json", description)
        result = {"file": str(target), "classes": len(classifier.classes), "bytes": target.stat().st_size}
        if args.onnx:
            result |= _onnx(out / "model.onnx", classifier, config)
        if args.mlflow:
            backbone = classifier.description.get("frozen", {}).get("model", {}).get("backbone")
            result |= _mlflow(out / "mlflow", target, args.run, backbone or config.model.backbone)
    except OSError as error:
        message = f"cannot be written ({error.strerror})"
        raise UserError("--out", str(out), message, "Choose another folder.") from None
    say(result, args.json, "exported:")
    return 0


def _onnx(path: Path, classifier: Classifier, config: Config) -> dict[str, Any]:
    from dl2pa.model.onnx_export import export_onnx

    images, source = _images(classifier, config)
    check = export_onnx(path, classifier, images)
    return {
        "onnx": str(path),
        "onnx_bytes": path.stat().st_size,
        "onnx_checked_on": source,
        **check.as_result(),
    }


def _images(classifier: Classifier, config: Config) -> tuple[Tensor, str]:
    """Preprocessed images spread over the validation set, or noise if it cannot be read; and which of the two."""
    import numpy as np
    import torch

    from dl2pa.model.example import encoded_image
    from dl2pa.training.data import open_split
    from pipelines.dataset import num_samples
    from pipelines.images import BadImage
    from pipelines.single import prepare_image

    prepared = classifier.description["preprocessing"]
    try:
        val = open_split(config, "val")
        samples = np.linspace(0, num_samples(val) - 1, min(_CHECKED, num_samples(val))).astype(int).tolist()
        files = [encoded_image(val, sample) for sample in samples]
        images = [prepare_image(file[0], **prepared) for file in files if file is not None]
    except (UserError, OSError, BadImage) as error:
        note(f"the validation images cannot be read ({error}); noise is used instead")
        images = []
    if images:
        return torch.stack(images), "validation images"
    side = prepared["image_size"]
    return torch.randn(_CHECKED, 3, side, side, generator=torch.Generator().manual_seed(0)), "noise"


def _mlflow(folder: Path, weights: Path, run: Path, backbone: str) -> dict[str, Any]:
    """Write the MLflow model folder, with a copy of the weights; replace that of an earlier export."""
    from dl2pa.tracking.model import write_model
    from dl2pa.tracking.payloads import serving_requirements
    from dl2pa.tracking.server import set_client_defaults

    set_client_defaults()
    example = RunDirectory(run).find_example()
    data = None if example is None else example.read_bytes()
    with replacing(folder) as temporary:
        write_model(temporary, weights, serving_requirements(backbone), data)
        shutil.rmtree(folder, ignore_errors=True)
    return {"mlflow": str(folder)}
