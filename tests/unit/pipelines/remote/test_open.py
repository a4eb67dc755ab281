"""Opening and indexing shards on a real S3 server; wrong addresses, missing objects, credentials and stale indexes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from dl2pa.errors import StorageUnavailable, UserError
from pipelines.datasets import ImageTable, open_dataset
from pipelines.datasets.build_index import build_index
from pipelines.remote.address import RemoteOptions, RemotePath, place_of
from pipelines.remote.index import build_remote_index
from support.objects import BUCKET, ObjectServer
from support.servers import free_port

Open = Callable[..., ImageTable]


def build(address: str, options: RemoteOptions, out: Path | None = None) -> Any:
    root = place_of("ROOT", address, options)
    assert isinstance(root, RemotePath)
    return build_remote_index(root, out or root / "dl2pa.index", 1, lambda done, total: None, False)


def remove(server: ObjectServer, address: str, name: str) -> None:
    server.client().delete_object(Bucket=BUCKET, Key=f"{address.removeprefix(f's3://{BUCKET}/')}/{name}")


def put(server: ObjectServer, address: str, name: str, content: bytes) -> None:
    key = f"{address.removeprefix(f's3://{BUCKET}/')}/{name}"
    server.client().put_object(Bucket=BUCKET, Key=key, Body=content)


def test_index_built_in_object_storage_equals_the_local_one(
    server: ObjectServer, copy: Path, options: RemoteOptions, open_at: Open, local: ImageTable, tmp_path: Path
) -> None:
    (copy / "more.tar.gz").write_bytes(b"no tar")
    address = server.upload(copy, f"{tmp_path.name}/deep/prefix", leave_out=("dl2pa.index",))
    built, expected = build(address, options), build_index(copy, copy / "dl2pa.index", 1)
    for name, split in built.splits.items():
        assert split.table.fingerprint == expected.splits[name].table.fingerprint
        assert (split.table.sizes == expected.splits[name].table.sizes).all()
        assert split.table.skipped.as_dict() == expected.splits[name].table.skipped.as_dict()
    table = open_at(address)
    assert table.read(7) == local.read(7)
    assert table.classes == local.classes


def test_changes_after_indexing_are_refused(
    server: ObjectServer, uploaded: str, options: RemoteOptions, open_at: Open, packed: Path
) -> None:
    build(uploaded, options)
    shard = sorted(packed.glob("train*.tar"))[0]
    data = bytearray(shard.read_bytes())
    data[700] ^= 255
    for name, content, problem in (
        (shard.name, bytes(data), "has another content than when it was indexed"),
        (shard.name, bytes(data[:-512]), "has another size"),
        (shard.name, None, "no longer exists"),
        ("train-999999.tar", bytes(1024), "does not contain the shard 'train-999999.tar'"),
        ("classes.txt", b"dog\ncat\n", "classes.txt has changed"),
    ):
        if content is None:
            remove(server, uploaded, name)
        else:
            put(server, uploaded, name, content)
        with pytest.raises(UserError, match=problem) as refused:
            open_at(uploaded)
        assert f"dl2pa data index {uploaded}`" in refused.value.remedy
        assert refused.value.value == f"{uploaded}/dl2pa.index"
        put(server, uploaded, shard.name, shard.read_bytes())
        if name != shard.name:
            remove(server, uploaded, name)
    open_at(uploaded)


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("s3://no-such-bucket/x", "there is no bucket 'no-such-bucket'"),
        (f"s3://{BUCKET}/no/such/prefix", "contains no objects"),
        ("s3://", "does not begin with the name of a bucket"),
        ("s3://UPPER/x", "does not begin with the name of a bucket"),
        (f"s3://{BUCKET}/../x", "contains . or .."),
    ],
)
def test_wrong_addresses_are_refused(address: str, problem: str, uploaded: str, open_at: Open) -> None:
    with pytest.raises(UserError, match=problem) as refused:
        open_at(address)
    assert refused.value.field == "data.root"


def test_credentials_in_an_address_are_not_repeated(open_at: Open) -> None:
    with pytest.raises(UserError) as refused:
        open_at("s3://AKIDEXAMPLE:wJalrXUtnFEMI@bucket/x")
    assert "wJalr" not in str(refused.value)


def test_missing_index_credentials_and_server_are_named(
    server: ObjectServer,
    uploaded: str,
    open_at: Open,
    options: RemoteOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remove(server, uploaded, "dl2pa.index")
    with pytest.raises(UserError, match=r"contains no dl2pa.index.*dl2pa data index s3://"):
        open_at(uploaded)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=r"needs credentials.*Set AWS_ACCESS_KEY_ID"):
        open_at(uploaded, "train", replace(options, s3_timeout_s=4.0))
    monkeypatch.undo()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StorageUnavailable, match=r"no connection to http://127\.0\.0\.1:"):
        open_at(uploaded, "train", replace(options, s3_timeout_s=3.0, s3_retry_s=0.1))


def test_index_may_be_a_local_file_or_another_object(
    server: ObjectServer, uploaded: str, options: RemoteOptions, local: ImageTable, tmp_path: Path
) -> None:
    root = place_of("data.root", uploaded, options)
    build(uploaded, options, tmp_path / "a.index")
    put(server, uploaded, "indexes/b.index", (tmp_path / "a.index").read_bytes())
    remove(server, uploaded, "dl2pa.index")
    for index in (tmp_path / "a.index", root / "indexes" / "b.index"):
        table = open_dataset("imagefolder", root, None, None, "train", index=index)
        assert isinstance(table, ImageTable) and table.read(1) == local.read(1)
    with pytest.raises(UserError, match="does not exist"):
        open_dataset("imagefolder", root, None, None, "train", index=root / "c.index")
    with pytest.raises(UserError, match=r"is in object storage, but data\.root is not"):
        open_dataset("imagefolder", tmp_path, None, None, "train", index=root / "c.index")


def test_validation_split_may_be_at_another_place(
    server: ObjectServer, copy: Path, options: RemoteOptions, packed: Path, tmp_path: Path
) -> None:
    for file in copy.glob("train*"):
        file.unlink()
    (copy / "dl2pa.index").unlink()
    address = server.upload(copy, f"{tmp_path.name}/val")
    build(address, options)
    place = place_of("data.val_root", address, options)
    table = open_dataset("imagefolder", packed, place, None, "val")
    assert isinstance(table, ImageTable)
    expected = open_dataset("imagefolder", packed, None, None, "val")
    assert isinstance(expected, ImageTable)
    assert [table.read(i) for i in range(12)] == [expected.read(i) for i in range(12)]
    assert table.labels.tolist() == expected.labels.tolist()


def test_damaged_index_and_unfinished_packing_are_refused(
    server: ObjectServer, uploaded: str, open_at: Open
) -> None:
    put(server, uploaded, "dl2pa.index", b"no index")
    with pytest.raises(UserError, match="not an index of this version") as refused:
        open_at(uploaded)
    assert refused.value.value == f"{uploaded}/dl2pa.index"
    put(server, uploaded, "pack.unverified", b"")
    with pytest.raises(UserError, match="incomplete or have failed their verification"):
        open_at(uploaded)


def test_parquet_files_are_read_through_an_uploaded_index(
    server: ObjectServer, options: RemoteOptions, local: ImageTable, tmp_path: Path, open_at: Open
) -> None:
    rows = [{"bytes": local.read(i), "path": f"{i}.jpg"} for i in range(8)]
    folder = tmp_path / "parquet/data"
    folder.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"image": rows, "label": [0, 1] * 4}), folder / "train-0.parquet")
    build_index(folder.parent, folder.parent / "dl2pa.index", 1)
    table = open_at(server.upload(folder.parent, f"{tmp_path.name}/parquet"))
    assert [table.read(i) for i in range(8)] == [row["bytes"] for row in rows]


def test_image_folders_in_object_storage_are_refused(
    server: ObjectServer, local: ImageTable, tmp_path: Path, open_at: Open
) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            file = tmp_path / "folder" / split / name / "1.jpg"
            file.parent.mkdir(parents=True)
            file.write_bytes(local.read(0))
    build_index(tmp_path / "folder", tmp_path / "folder/dl2pa.index", 1)
    with pytest.raises(UserError, match=r"only in shards.*dl2pa data pack"):
        open_at(server.upload(tmp_path / "folder", f"{tmp_path.name}/folder"))


def test_index_command_reports_a_wrong_shard_by_its_address(
    server: ObjectServer, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dl2pa import cli

    (copy / "train-000000.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    address = server.upload(copy, f"{tmp_path.name}/wrong")
    assert cli.main(["data", "index", address, "--workers", "1", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["field"], error["value"]) == ("ROOT", f"{address}/train-000000.tar")
    assert "compressed with gzip" in error["message"]
    assert cli.main(["data", "pack", address, str(tmp_path / "out")]) == 2
    assert cli.main(["data", "index", address, "--label-column", "x"]) == 2


def test_configuration_refuses_object_storage_for_other_data_sets() -> None:
    from dl2pa.config import parse_config
    from dl2pa.config.validate import validate

    config = parse_config({"data": {"dataset": "cifar10", "root": "s3://bucket/x"}})
    with pytest.raises(UserError, match=r"not read by data\.dataset=cifar10"):
        validate(config, 1)


def test_copies_of_indexes_are_shared_and_replaced(
    server: ObjectServer, uploaded: str, open_at: Open, options: RemoteOptions
) -> None:
    open_at(uploaded)
    (first,) = options.folder().glob("*.index")
    first.write_bytes(first.read_bytes()[:100])  # cut by a crash
    open_at(uploaded)
    assert first.stat().st_size > 100
    build(uploaded, options)
    open_at(uploaded)
    assert len(list(options.folder().glob("*.index"))) == 2


def test_parts_of_an_address_are_read_with_its_options() -> None:
    options = RemoteOptions(s3_retry_s=7.0)
    root = place_of("ROOT", "s3://bucket/photos", options)
    for path in (root / "train" / "a.tar", (root / "train" / "a.tar").parent, root.parent):
        assert isinstance(path, RemotePath)
        assert path.options is options
