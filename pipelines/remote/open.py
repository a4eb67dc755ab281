"""Open shards in object storage through their index, which may be in object storage too."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from dl2pa.errors import UserError, UserErrors
from pipelines.datasets.freshness import digest_of, stale
from pipelines.datasets.index import INDEX_NAME, Index, SplitIndex, read_index, rebuild_command
from pipelines.datasets.shards import UNVERIFIED_NAME, incomplete_pack, shards_among
from pipelines.remote.address import RemotePath
from pipelines.remote.files import RemoteFiles
from pipelines.remote.store import RemoteObject, Store, store_of

log = logging.getLogger(__name__)

_UNUSED_S = 30 * 86400.0
"""Copies of indexes that no run has opened for this time are removed."""

Listing = Mapping[str, RemoteObject]
"""Objects of a folder by name."""


def list_root(store: Store, root: RemotePath, field: str) -> dict[str, Listing]:
    """Objects in `root` and in its folders ``train`` and ``val``, by folder.

    Raises:
        UserError: there are none, or packed shards that are incomplete (`field`).
    """
    with renamed(field=field):
        listing: dict[str, Listing] = {name: store.list(root / name if name else root) for name in FOLDERS}
    if not any(listing.values()):
        message = "contains no objects"
        raise UserError(field, str(root), message, "Correct the bucket and the prefix, or upload the shards.")
    if UNVERIFIED_NAME in listing[""]:
        raise incomplete_pack(str(root), field)
    return listing


FOLDERS = ("", "train", "val")


def open_remote_index(root: RemotePath, index: Path | None, field: str) -> tuple[Index, Path]:
    """Open the index of `root` and compare it with the shards; the tables read the versions that are there now.

    Args:
        index: a file or an object; None: ``dl2pa.index`` in `root`.
        field: configuration key of `root`.

    Returns:
        The index, and its place for messages.

    Raises:
        UserError: there is no index, it is damaged, or it is older than the shards.
        StorageUnavailable: the server does not answer.
    """
    store = store_of(root.options)
    listing = list_root(store, root, field)
    place = index or root / INDEX_NAME
    if index is None and INDEX_NAME not in listing[""]:
        remedy = f"Create it with `dl2pa data index {root}`."
        raise UserError(field, str(root), f"contains no {INDEX_NAME}", remedy)
    if isinstance(place, RemotePath):
        with renamed(field="data.index"):
            file = _copy_of_index(store, place, listing[""].get(place.name) if index is None else None)
    else:
        file = place
    with renamed(str(file), str(place)):
        content = read_index(file, root)
    _check_texts(store, root, content, listing[""], place)
    splits = {
        name: _connect(store, root, name, split, listing, place, content)
        for name, split in content.splits.items()
    }
    return replace(content, splits=splits), place


def _copy_of_index(store: Store, place: RemotePath, one: RemoteObject | None) -> Path:
    """The copy of an index on this node, which its processes map; it is downloaded if it is missing.

    Raises:
        UserError: there is no such object.
    """
    one = one or store.list(place.parent).get(place.name)
    if one is None:
        raise UserError("data.index", str(place), "does not exist", "Create it with `dl2pa data index`.")
    name = hashlib.sha256(repr((str(place), one)).encode()).hexdigest()[:32]
    folder = place.options.folder()
    file = folder / f"{name}.index"
    if not file.is_file() or file.stat().st_size != one.size:
        for old in folder.glob("*.index"):
            with suppress(OSError):
                if time.time() - old.stat().st_mtime > _UNUSED_S:
                    old.unlink()
        store.download(place, one, file, durable=True)
    os.utime(file)
    return file


def _check_texts(store: Store, root: RemotePath, index: Index, present: Listing, place: Path) -> None:
    """Refuse an index whose files of class names have changed."""
    from pipelines.datasets.index import CLASS_FILES

    if index.texts is None:
        return
    for name in CLASS_FILES:
        one = present.get(name)
        now = None if one is None else digest_of(store.content(root / name, one))
        if now != index.texts.get(name):
            problem = f"{name} has changed since the shards were indexed"
            raise stale(place, problem, f"Run `{rebuild_command(place, root)}` again.")


def _connect(
    store: Store,
    root: RemotePath,
    name: str,
    split: SplitIndex,
    listing: dict[str, Listing],
    place: Path,
    index: Index,
) -> SplitIndex:
    """The split with its shards connected, after the comparison with the listing.

    Raises:
        UserError: the index is of image files; or a shard has changed, is missing or is new.
    """
    table, states = split.table, split.states
    if table.members is None:
        message = "is an index of image files, which are read from object storage only in shards"
        remedy = "Pack them with `dl2pa data pack`, and upload the shards."
        raise UserError("data.index", str(place), message, remedy)
    folder = "" if table.root == root else table.root.name
    known = {f"{folder}/{name}".strip("/"): one for name, one in listing.get(folder, {}).items()}
    for below in sorted({file.rpartition("/")[0] for file in table.files} - {""}):
        known |= {f"{below}/{n}": one for n, one in store.list(root / folder / below).items()}
    remedy = f"Run `{rebuild_command(place, root, index.source)}` again."
    objects: list[RemoteObject] = []
    for file in table.files:
        one = known.get(f"{folder}/{file}".strip("/")) or known.get(file)
        if one is None:
            raise stale(place, f"{file!r} no longer exists", f"Upload it, or: {remedy}")
        objects.append(replace(one, name=file))
    by_name = {one.name: one for one in objects}
    for i, path in enumerate(() if states is None else states.paths):
        assert states is not None
        one = by_name.get(path)
        if one is None or one.size != states.sizes.item(i):
            raise stale(place, f"{path!r} has another size than when it was indexed", remedy)
        if states.tags is not None and states.tags[i] != one.tag:
            raise stale(place, f"{path!r} has another content than when it was indexed (its ETag)", remedy)
    new = set(shards_among(listing).get(name, ())) - {f"{folder}/{file}".strip("/") for file in table.files}
    if new and table.members.spans is None and states is not None:
        raise stale(place, f"it does not contain the shard {min(new)!r}", remedy)
    return replace(
        split, table=replace(table, remote=RemoteFiles(root / folder if folder else root, objects))
    )


@contextmanager
def renamed(before: str = "", after: str = "", field: str | None = None) -> Generator[None]:
    """Replace a text, such as the name of a temporary copy, and the field in the user errors of the context."""

    def rename(error: UserError) -> UserError:
        fields = error.as_dict()
        texts = {
            key: value.replace(before, after) if before and isinstance(value, str) else value
            for key, value in fields.items()
        }
        return UserError(
            field if field and texts["field"] == "data.root" else texts["field"],
            *(texts[key] for key in ("value", "message", "remedy")),
        )

    try:
        yield
    except UserErrors as errors:
        raise UserErrors([rename(error) for error in errors.problems]) from None
    except UserError as error:
        raise rename(error) from None
