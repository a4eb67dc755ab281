"""Classifier of the images of a table, on its device, batch by batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dl2pa.model.inference import Classifier, Prediction, Predictions
from dl2pa.training.train_state import autocast
from pipelines.bulk import BulkOptions, ImageBatch, open_batches
from pipelines.datasets.table import ImageTable

Progress = Callable[[int, int], None]
"""Called with the number of images done and of all images."""


@dataclass(frozen=True, eq=False)
class BulkClassifier:
    """Classifier for the images of a table.

    Attributes:
        precision: fp32, bf16 or fp16. In fp32, the loader `torchvision` in batches of 64 gives the bits of
            ``Classifier.predict``.
    """

    classifier: Classifier
    options: BulkOptions
    precision: str = "fp32"

    def digest(self) -> str:
        """SHA-256 of the weights, the description and the settings that the results depend on."""
        classifier = self.classifier
        digest = hashlib.sha256(json.dumps(classifier.description, sort_keys=True).encode())
        for name, tensor in sorted(classifier.embedder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        digest.update(classifier.class_vectors.data)
        return digest.hexdigest()

    def embeddings(
        self, table: ImageTable, samples: Sequence[int] | None = None
    ) -> Generator[tuple[ImageBatch, Tensor]]:
        """Unit embeddings [n, d], float32 on the host, of each step of the table or of `samples` of it."""
        for batch in self._batches(table, samples):
            if not len(batch.samples):
                yield batch, torch.empty(0, self.classifier.head.vectors.shape[1])
                continue
            with autocast(self.precision, self.classifier.device):
                vectors = self.classifier.unit_vectors(batch.images)
            yield batch, vectors.float().cpu()

    def predictions(
        self, table: ImageTable, top: int
    ) -> Generator[tuple[ImageBatch, list[list[Prediction]]]]:
        """The `top` most probable classes of each image of each step."""
        for batch in self._batches(table, None):
            yield batch, self._predict(batch.images).top(top) if len(batch.samples) else []

    def _predict(self, images: Tensor) -> Predictions:
        with autocast(self.precision, self.classifier.device):
            return self.classifier.predict_prepared([images])

    def _batches(self, table: ImageTable, samples: Sequence[int] | None) -> Generator[ImageBatch]:
        preprocessing = self.classifier.description["preprocessing"]
        with open_batches(table, preprocessing, self.options, self.classifier.device, samples) as batches:
            yield from batches
