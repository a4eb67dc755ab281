"""Check of the keys that may name object storage."""

from __future__ import annotations

from collections.abc import Iterator

from dl2pa.config.gather import gathered
from dl2pa.config.schema import Config
from dl2pa.errors import UserError
from dl2pa.specs import IMAGE_FOLDER, SYNTHETIC, is_remote


@gathered
def check_remote(config: Config) -> Iterator[UserError]:
    """Check that only tar shards are read from object storage."""
    data = config.data
    for field, value in (("root", data.root), ("val_root", data.val_root), ("index", data.index)):
        if is_remote(value) and data.dataset not in (IMAGE_FOLDER, SYNTHETIC):
            message = f"object storage is not read by data.dataset={data.dataset}"
            remedy = f"Set data.dataset={IMAGE_FOLDER}, which reads tar shards, or a local folder."
            yield UserError(f"data.{field}", value, message, remedy)
    if is_remote(data.s3_cache_dir):
        message, remedy = "is not a folder of the node", "Set a folder on a disk of the node."
        yield UserError("data.s3_cache_dir", data.s3_cache_dir, message, remedy)
