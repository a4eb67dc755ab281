"""Addresses in object storage, `s3://bucket/prefix`, used like paths."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Any

from dl2pa.errors import UserError
from dl2pa.osutil import private_temporary_folder
from pipelines.names import REMOTE, is_remote

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True)
class RemoteOptions:
    """How objects are read: the values of the keys `data.s3_*`.

    Attributes:
        s3_cache_dir: folder of the cache; None: `dl2pa-UID/s3` in the folder of temporary files.
        s3_cache_gib: size limit of the cache, in GiB; 0: no cache.
        s3_timeout_s: time after which a request is repeated.
        s3_retry_s: time for which a failing request is repeated.
    """

    s3_cache_dir: str | None = None
    s3_cache_gib: float = 50.0
    s3_timeout_s: float = 30.0
    s3_retry_s: float = 120.0

    def folder(self) -> Path:
        """Folder of the cache, which is created if it is missing.

        Raises:
            UserError: it cannot be created (``data.s3_cache_dir``).
        """
        try:
            if self.s3_cache_dir is None:
                return private_temporary_folder("s3")
            folder = Path(self.s3_cache_dir).expanduser().absolute()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            place = self.s3_cache_dir or tempfile.gettempdir()
            message, remedy = f"cannot be created: {error.strerror}", "Set a folder on a disk of the node."
            raise UserError("data.s3_cache_dir", place, message, remedy) from None
        return folder


class RemotePath(PosixPath):
    """Address of a bucket, a folder or an object. Its text is the address; it is never a file of this machine.

    Attributes:
        options: how it is read; those of a parent folder.
    """

    options: RemoteOptions = RemoteOptions()

    @property
    def bucket(self) -> str:
        return self.parts[0]

    @property
    def key(self) -> str:
        """Path in the bucket, without a slash at its beginning or end."""
        return "/".join(self.parts[1:])

    @property
    def parent(self) -> RemotePath:
        """The folder that contains it, with the same options."""
        return _rebuilt(self.parts[:-1], self.options)

    def __truediv__(self, name: Any) -> RemotePath:
        child: Any = super().__truediv__(name)
        child.options = self.options
        return child

    def __reduce__(self) -> Any:
        return _rebuilt, (self.parts, self.options)

    def __str__(self) -> str:
        return REMOTE + super().__str__()

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def resolve(self, strict: bool = False) -> RemotePath:
        return self

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """Refuse to look for it in the file system."""
        raise NotImplementedError(f"{self} is not a file of this machine")


def _rebuilt(parts: tuple[str, ...], options: RemoteOptions) -> RemotePath:
    path = RemotePath(*parts)
    path.options = options
    return path


def place_of(field: str, text: str, options: RemoteOptions | None = None) -> Path:
    """Path of a local file or folder, or address in object storage.

    Raises:
        UserError: not a valid address (`field`).
    """
    if not is_remote(text):
        return Path(text)
    bucket, _, key = text.removeprefix(REMOTE).partition("/")
    if _BUCKET.fullmatch(bucket) is None:
        # An address may not contain credentials, which the message would repeat.
        shown = "s3://***" if "@" in text or ":" in bucket else text
        message = "does not begin with the name of a bucket"
        remedy = (
            "Write s3://BUCKET/PREFIX; credentials and AWS_ENDPOINT_URL are read from the environment "
            "or ~/.aws."
        )
        raise UserError(field, shown, message, remedy)
    parts = [part for part in key.split("/") if part]
    if any(part in (".", "..") for part in parts):
        raise UserError(field, text, "contains . or ..", "Write the whole prefix.")
    return _rebuilt((bucket, *parts), options or RemoteOptions())
