"""MLflow pyfunc model: encoded images in, classes out. MLflow executes a copy of this file (models from code).

Serving needs this file, ``dl2pa.model.inference`` and ``pipelines.single``, which are copied into the logged model,
and the packages that ``dl2pa.tracking.payloads.serving_requirements`` pins.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from dl2pa.model.inference import Classifier, Prediction, load_classifier
from pipelines.images import BadImage
from pipelines.single import prepare_image

_BATCH = 64


class ImageClassifier(PythonModel):
    """Predicts class, probability and top-k classes from the column ``image``: encoded bytes, base64 in JSON."""

    def load_context(self, context: PythonModelContext) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._device = device
        self._classifier: Classifier = load_classifier(Path(context.artifacts["model"])).to(device)

    # No type annotations: MLflow would derive a signature from them.
    def predict(self, context, model_input, params=None):  # pyright: ignore
        """Return a data frame with one row per row of the data frame `model_input`.

        Raises:
            MlflowException: a row cannot be decoded as an image, or `top_k` is less than 1.
        """
        import pandas as pd

        count = int((params or {}).get("top_k", 5))
        if count < 1:
            raise MlflowException.invalid_parameter_value(f"top_k={count}: must be at least 1")
        images = list(model_input["image"])
        rows: list[Mapping[str, Any]] = []
        for first in range(0, len(images), _BATCH):
            part = images[first : first + _BATCH]
            batch = torch.stack([self._prepare(image, first + i) for i, image in enumerate(part)])
            rows += map(_row, self._classifier.predict_prepared([batch.to(self._device)]).top(count))
        return pd.DataFrame(rows, columns=["class_index", "class_name", "probability", "top"])

    def _prepare(self, image: object, row: int) -> torch.Tensor:
        try:
            data = base64.b64decode(image, validate=True) if isinstance(image, str) else bytes(image)  # pyright: ignore[reportArgumentType]
            return prepare_image(data, **self._classifier.description["preprocessing"])
        except (BadImage, binascii.Error, TypeError, ValueError) as error:
            message = f"row {row}: the column `image` cannot be decoded as an image ({error})"
            raise MlflowException.invalid_parameter_value(message) from None


def _row(top: list[Prediction]) -> dict[str, Any]:
    best = top[0]
    return {
        "class_index": best.label,
        "class_name": best.name,
        "probability": best.probability,
        "top": [{"class": g.name, "index": g.label, "probability": g.probability} for g in top],
    }


set_model(ImageClassifier())
