"""Export a classifier to ONNX, from normalized images to logits and probabilities; check it against the original."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dl2pa.errors import UserError
from dl2pa.model.inference import Classifier
from dl2pa.model.onnx_packages import check_installed
from dl2pa.osutil import replacing

TOLERANCE = 1e-3
"""Largest permitted difference of a logit, relative to the largest logit."""
_OPSET = 20


@dataclass(frozen=True)
class Check:
    """Comparison of the exported model with the original.

    Attributes:
        images: number of images compared.
        largest_difference: largest absolute difference of a logit.
        relative_difference: the same relative to the largest logit.
        top1_equal: percentage of images with the same top-1 class.
    """

    images: int
    largest_difference: float
    relative_difference: float
    top1_equal: float

    def as_result(self) -> dict[str, Any]:
        """Fields as `dl2pa export` prints them."""
        return {f"onnx_{key}": value for key, value in asdict(self).items()}


class _Scorer(nn.Module):
    """Embedder and classifier head as one module."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.embedder = classifier.embedder
        self.head = classifier.head
        self.temperature = classifier.temperature

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head.logits(self.embedder(images))
        return logits, (logits / self.temperature).softmax(dim=1)


def export_onnx(path: Path, classifier: Classifier, images: Tensor) -> Check:
    """Write the classifier to `path`, atomically, if its results equal the original's.

    The input is `images`, float32 [B, 3, S, S] with any B, resized, cropped and normalized as the metadata
    `preprocessing` says; the outputs are `logits` and `probabilities`, float32 [B, C]: the softmax of the logits
    divided by the metadata `temperature`. Class names are in the metadata `classes`.

    Args:
        classifier: on the CPU.
        images: normalized images [N, 3, S, S] for the comparison.

    Raises:
        UserError: a package is missing, or the file's results differ beyond ``TOLERANCE``.
    """
    check_installed()
    import onnx

    model = _convert(classifier, images.shape[-1])
    _describe(model, classifier.description)
    onnx.checker.check_model(model, full_check=True)
    with replacing(path) as temporary:
        onnx.save(model, temporary)
        check = compare(temporary, classifier, images)
        if not check.relative_difference <= TOLERANCE:
            raise UserError(
                "--onnx",
                str(path),
                f"logits differ by {check.largest_difference:.3g} ({check.relative_difference:.2g} of the largest) "
                f"from the original; top-1 agrees on {check.top1_equal:.2f} %. No file was written",
                "Use model.safetensors, and report the backbone and the installed versions.",
            )
    return check


def compare(path: Path, classifier: Classifier, images: Tensor, batch: int = 24) -> Check:
    """Compare the file, run by ONNX Runtime on the CPU, with the original; the last batch is smaller."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    parts = images.split(batch)
    expected = torch.cat([classifier.score(part) for part in parts])
    exported = torch.cat(
        [torch.from_numpy(session.run(["logits"], {"images": p.contiguous().numpy()})[0]) for p in parts]
    )
    difference = float((expected - exported).abs().max())
    equal = (expected.argmax(dim=1) == exported.argmax(dim=1)).double().mean()
    return Check(
        images=len(images),
        largest_difference=difference,
        relative_difference=difference / max(float(expected.abs().max()), 1e-12),
        top1_equal=100.0 * float(equal),
    )


def _convert(classifier: Classifier, side: int) -> Any:
    """Convert with torch's exporter based on ``torch.export``."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Scorer(classifier).eval(),
                (torch.zeros(2, 3, side, side),),
                dynamo=True,
                opset_version=_OPSET,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                input_names=["images"],
                output_names=["logits", "probabilities"],
                verbose=False,
            )
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert program is not None, "the exporter based on torch.export returns a program"
    return program.model_proto


def _describe(model: Any, description: dict[str, Any]) -> None:
    """Set the metadata needed to use the file; remove the exporter's, which contains paths of this machine."""
    for part in (model.graph, *model.functions):
        for entry in (part, *part.node, *part.value_info):
            del entry.metadata_props[:]
            entry.doc_string = ""
    graph = model.graph
    for entry in (model, *graph.input, *graph.output, *graph.initializer):
        del entry.metadata_props[:]
    fields = {
        "format": "dl2pa-onnx-1",
        "classes": json.dumps(description["classes"]),
        "preprocessing": json.dumps({**description["preprocessing"], "channels": "RGB"}),
        "method": description["method"],
        "model": json.dumps(description["model"]),
        "temperature": json.dumps(description.get("temperature", 1.0)),
    }
    for key, value in fields.items():
        model.metadata_props.add(key=key, value=value)
    inputs = "images: float32 [batch, 3, S, S], normalized as `preprocessing`"
    model.doc_string = f"{inputs}; logits and probabilities: [batch, classes]"
    model.producer_name = "dl2pa"
