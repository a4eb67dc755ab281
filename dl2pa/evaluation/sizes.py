"""Check of the image size of an evaluation, which can differ from that of the training."""

from __future__ import annotations

from dl2pa.backbones import probe_forward
from dl2pa.config import Config
from dl2pa.errors import UserError
from dl2pa.model.inference import Classifier


def check_image_size(config: Config, classifier: Classifier) -> None:
    """Refuse an image size that the network does not accept, as of vision transformers with another one.

    Raises:
        UserError: for data.image_size.
    """
    side, trained = config.data.image_size, classifier.description["preprocessing"]["image_size"]
    if classifier.takes_features or side == trained:
        return
    try:
        probe_forward(classifier.embedder, side)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        message = f"the network does not accept images of this size ({reason})"
        raise UserError("data.image_size", side, message, f"Set data.image_size={trained}.") from None
