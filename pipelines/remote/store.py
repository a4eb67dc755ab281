"""Requests to an S3 server through s3fs: ranges of objects, listings, copies; retries and messages.

Credentials and the endpoint come from the environment and the standard files of AWS; dl2pa never reads or records them.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dl2pa.errors import StorageUnavailable, UserError, install_command
from dl2pa.osutil import replacing
from pipelines.remote.address import RemoteOptions, RemotePath

log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_REQUESTS = 32
"""Concurrent requests of one process."""
_PART = 8 << 20
"""Bytes per request of a copy."""
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.1, 5.0
_BUSY = (
    "SlowDown",
    "Throttling",
    "RequestTimeout",
    "RequestLimitExceeded",
    "InternalError",
    "ServiceUnavailable",
)
"""Beginnings of the codes of answers after which a request is repeated."""
_CREDENTIALS = (
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"),
    *("UnrecognizedClientException", "InvalidClientTokenId"),
)
_SET_CREDENTIALS = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or write ~/.aws/credentials."
)
_FIELD = "data.root"


@dataclass(frozen=True)
class RemoteObject:
    """An object of a listing.

    Attributes:
        name: last part of its key.
        tag: its ETag, which changes with its content.
        modified_ns: time of the last change, nanoseconds since 1970.
    """

    name: str
    size: int
    tag: str
    modified_ns: int


class _Incomplete(Exception):
    """An answer that ended early."""


def store_of(options: RemoteOptions) -> Store:
    """The connection of this process for these options and the present AWS variables of the environment."""
    variables = frozenset((key, value) for key, value in os.environ.items() if key.startswith("AWS_"))
    return _store(options, os.getpid(), variables)


@functools.lru_cache(maxsize=4)
def _store(options: RemoteOptions, _pid: int, _variables: frozenset[tuple[str, str]]) -> Store:
    return Store(options)


class Store:
    """A connection to the S3 server of the environment; its requests run in the event loop of fsspec.

    Raises:
        UserError: s3fs is not installed.
    """

    def __init__(self, options: RemoteOptions) -> None:
        if importlib.util.find_spec("s3fs") is None:
            remedy = f"Install it: {install_command('s3')}."
            raise UserError(_FIELD, "s3://", "needs the package s3fs, which is not installed", remedy)
        from s3fs import S3FileSystem

        for name in ("aiobotocore", "botocore", "s3fs"):  # they log where credentials were found
            logging.getLogger(name).setLevel(logging.WARNING)
        self.options = options
        config = {
            "connect_timeout": options.s3_timeout_s,
            "read_timeout": options.s3_timeout_s,
            "max_pool_connections": _MAX_REQUESTS,
            "retries": {"total_max_attempts": 1},  # this module repeats requests
            # Servers other than AWS do not support the checksums that botocore sends and asks for by default.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        self._files = S3FileSystem(config_kwargs=config, skip_instance_cache=True, use_listings_cache=False)
        self._files.retries = 1
        self._slots = asyncio.Semaphore(_MAX_REQUESTS)
        self._failing_since: float | None = None

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run requests in the background."""
        loop: Any = self._files.loop
        return asyncio.run_coroutine_threadsafe(work, loop)

    async def range(self, path: RemotePath, tag: str, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` - 1 of the version `tag` of an object.

        Raises:
            UserError: the object has changed, is missing, or may not be read.
            StorageUnavailable: the server has not answered for the time of the options.
        """

        async def get(client: Any) -> bytes:
            span = f"bytes={begin}-{end - 1}"
            answer = await client.get_object(Bucket=path.bucket, Key=path.key, Range=span, IfMatch=tag)
            async with answer["Body"] as body:
                data = await body.read()
            if len(data) != end - begin:
                raise _Incomplete(f"{len(data)} of {end - begin} bytes")
            return data

        return await self._repeated(get, path)

    def content(self, path: RemotePath, one: RemoteObject) -> bytes:
        """All bytes of a small object."""
        return self.start(self.range(path, one.tag, 0, one.size)).result() if one.size else b""

    def list(self, folder: RemotePath) -> dict[str, RemoteObject]:
        """Objects in a folder, not below it, by name in the order of names.

        Raises:
            UserError, StorageUnavailable: see ``range``.
        """
        prefix = f"{folder.key}/" if folder.key else ""

        async def one_page(client: Any, token: str | None) -> Any:
            more = {"ContinuationToken": token} if token else {}
            return await client.list_objects_v2(Bucket=folder.bucket, Prefix=prefix, Delimiter="/", **more)

        async def pages() -> dict[str, RemoteObject]:
            objects: list[RemoteObject] = []
            token: str | None = None
            while True:
                answer = await self._repeated(functools.partial(one_page, token=token), folder)
                objects += [_object(content, prefix) for content in answer.get("Contents", ())]
                token = answer.get("NextContinuationToken")
                if not token:
                    return {one.name: one for one in sorted(objects, key=lambda one: one.name) if one.name}

        return self.start(pages()).result()

    def download(self, path: RemotePath, one: RemoteObject, target: Path, *, durable: bool) -> None:
        """Copy an object to a file, atomically; see ``replacing`` for `durable`."""

        async def parts(file: Any) -> None:
            begins = iter(range(0, one.size, _PART))

            async def work() -> None:
                for begin in begins:
                    data = await self.range(path, one.tag, begin, min(begin + _PART, one.size))
                    os.pwrite(file.fileno(), data, begin)  # refused if the file was closed meanwhile

            workers = [asyncio.ensure_future(work()) for _ in range(4)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()

        with replacing(target, one.size, durable=durable) as temporary, temporary.open("wb") as file:
            copy = self.start(parts(file))
            try:
                copy.result()
            except BaseException:
                copy.cancel()
                raise

    def upload(self, file: Path, path: RemotePath) -> None:
        """Copy a file to an object.

        Raises:
            UserError, StorageUnavailable: see ``range``.
        """

        async def put(client: Any) -> None:
            await self._files._put_file(str(file), f"{path.bucket}/{path.key}")  # pyright: ignore[reportPrivateUsage]

        self.start(self._repeated(put, path, limited=False)).result()

    async def _repeated(
        self, request: Callable[[Any], Awaitable[T]], path: RemotePath, *, limited: bool = True
    ) -> T:
        """Send a request until it is answered.

        Args:
            limited: whether it is repeated after the timeout.
        """
        options = self.options
        begin: float | None = None
        pause = _FIRST_PAUSE_S
        while True:
            try:
                async with self._slots:
                    client = await self._files.set_session()
                    seconds = options.s3_timeout_s if limited else None
                    result = await asyncio.wait_for(request(client), seconds)
                self._answered()
                return result
            except Exception as error:
                reason = _passing_reason(error)
                if reason is None:
                    raise _refusal(path, error) from None
                now = time.monotonic()
                begin = begin or now
                if now - begin >= options.s3_retry_s:
                    text = f"{path} could not be read for {now - begin:.1f} s ({reason})"
                    remedy = "the same command continues (data.s3_retry_s)"
                    raise StorageUnavailable(f"{text}; {remedy}") from None
                self._failed(path, reason)
            await asyncio.sleep(min(pause, options.s3_retry_s) * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _MAX_PAUSE_S)

    def _failed(self, path: RemotePath, reason: str) -> None:
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            log.warning("%s: %s; retrying for up to %g s", path, reason, self.options.s3_retry_s)

    def _answered(self) -> None:
        if self._failing_since is not None:
            log.info("object storage answers again after %.1f s", time.monotonic() - self._failing_since)
            self._failing_since = None


def _object(content: dict[str, Any], prefix: str) -> RemoteObject:
    modified = round(content["LastModified"].timestamp() * 1e9)
    return RemoteObject(content["Key"][len(prefix) :], content["Size"], content["ETag"], modified)


def _passing_reason(error: Exception) -> str | None:
    """Why a request failed, if it may succeed later; None for a refusal."""
    import aiohttp
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        code, status = _code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return f"answer {status} {code}" if status >= 500 or status == 429 or code.startswith(_BUSY) else None
    if isinstance(error, boto.SSLError | FileNotFoundError | PermissionError):
        return None
    passing = (
        *(boto.HTTPClientError, boto.ConnectionError, boto.ResponseStreamingError, boto.IncompleteReadError),
        *(boto.CredentialRetrievalError, boto.MetadataRetrievalError),
        *(aiohttp.ClientError, TimeoutError, OSError, _Incomplete),
    )
    if isinstance(error, boto.EndpointConnectionError):
        server = urlsplit(str(error.kwargs.get("endpoint_url")))
        return f"no connection to {server.scheme}://{server.netloc.rpartition('@')[2]}"
    if isinstance(error, passing) or "ResponseParserError" in type(error).__name__:
        return " ".join(str(error).split()) or "no answer in time"
    return None


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _refusal(path: RemotePath, error: Exception) -> UserError:
    """The message for a request that would fail again."""
    from botocore import exceptions as boto

    def refuse(message: str, remedy: str) -> UserError:
        return UserError(_FIELD, str(path), message, remedy)

    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return refuse(f"needs credentials ({error})", _SET_CREDENTIALS)
    if isinstance(error, boto.ClientError):
        code, status = _code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status == 412 or code == "PreconditionFailed":
            remedy = "Run `dl2pa data index` on its folder again, then start again."
            return refuse("has changed since it was indexed or opened (it has another ETag)", remedy)
        if code == "NoSuchBucket":
            remedy = "Correct the name, or set AWS_ENDPOINT_URL to the server of the bucket."
            return refuse(f"there is no bucket {path.bucket!r}", remedy)
        if status == 404:
            return refuse("does not exist", "Restore it, or run `dl2pa data index` on its folder again.")
        if code in _CREDENTIALS:
            return refuse(f"the credentials are refused ({code})", _SET_CREDENTIALS)
        if status == 403:
            remedy = "Use credentials that may list the bucket and read its objects (to index: write)."
            return refuse(f"access is denied ({code})", remedy)
        return refuse(
            f"the server refuses the request ({status} {code})", "Correct the address and AWS_REGION."
        )
    if isinstance(error, UserError):
        return error
    return refuse(
        f"cannot be read ({' '.join(str(error).split())})", "Correct AWS_ENDPOINT_URL or ~/.aws/config."
    )
