"""Damaged and hostile files of every format that dl2pa reads: one message each, in bounded time and memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from dl2pa.config import load_config
from dl2pa.errors import UserError
from dl2pa.geometry import load_prototypes
from dl2pa.model.inference import load_classifier
from pipelines.datasets.build_index import build_index
from pipelines.datasets.cifar import load_cifar10
from pipelines.datasets.index import open_index
from pipelines.datasets.stl10 import load_stl10
from pipelines.datasets.svhn import load_svhn
from pipelines.single import load_image

SECONDS, BYTES = 5, 500 * 2**20
PREPROCESSING: Any = {"resize_shorter_side": 16, "image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
GOOD = np.vstack([np.eye(5), -np.eye(5)]).astype(np.float32).tobytes()
HUGE = (2**31 - 1, 2**40, 2**62)


def cut(data: bytes, *places: int) -> dict[str, bytes]:
    return {f"cut at {place}": data[:place] for place in places}


def flipped(data: bytes, seed: int, count: int) -> dict[str, bytes]:
    """Copies with some bytes changed at random."""
    random = np.random.default_rng(seed)
    found: dict[str, bytes] = {}
    for number in range(count):
        copy = bytearray(data)
        for place in random.integers(0, min(len(copy), 600), 6):
            copy[place] = random.integers(256)
        found[f"changed {number}"] = bytes(copy)
    return found


# Images ----------------------------------------------------------------------------------------------------------


def jpeg(height: int = 16, width: int = 16) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def claiming(height: int, width: int) -> bytes:
    """A small JPEG with other dimensions in its frame header."""
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def png(width: int, height: int, body: bytes = b"") -> bytes:
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 72 72
%%EndComments
(TRACE) (w) file closefile
showpage
"""


def images() -> Iterator[tuple[str, bytes]]:
    whole = jpeg()
    yield "empty", b""
    yield "text", b"no image at all"
    yield "EPS", EPS
    yield "EPS in a binary wrapper", b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(EPS)) + b"\0" * 18 + EPS
    yield "SVG", b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    yield "PDF", b"%PDF-1.4\n1 0 obj\n"
    yield "PSD", b"8BPS\0\1" + b"\0" * 40
    gif = io.BytesIO()
    Image.new("P", (8, 8)).save(gif, "GIF")
    yield "GIF", gif.getvalue()
    tiff = io.BytesIO()
    Image.new("RGB", (8, 8)).save(tiff, "TIFF")
    yield "TIFF", tiff.getvalue()
    yield "AVIF", b"\0\0\0\x1cftypavif" + b"\0" * 40
    yield "FITS", b"SIMPLE  =                    T" + b" " * 100
    yield "13000 x 13000 in 631 bytes", claiming(13000, 13000)
    yield "65500 x 65500", claiming(65500, 65500)
    yield "no rows", claiming(0, 16)
    yield "PNG of 30000 x 30000", png(30000, 30000)
    yield "PNG of 2^31 x 2^31", png(2**31 - 1, 2**31 - 1)
    yield "PNG without pixels", png(64, 64)
    yield (
        "BMP of 2^30 rows",
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
    )
    yield "WEBP of nothing", b"RIFF" + struct.pack("<I", 2**31) + b"WEBPVP8L" + b"\0" * 12
    yield from cut(whole, 1, 2, 3, 10, 20, 100, len(whole) // 2).items()


# Tar shards ------------------------------------------------------------------------------------------------------


def tar(*members: tuple[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with a given size field."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size.ljust(12, b"\0")
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def base256(number: int) -> bytes:
    return (b"\x80" if number >= 0 else b"\xff") + number.to_bytes(11, "big", signed=True)


def shards() -> Iterator[tuple[str, bytes]]:
    sample = (("a.jpg", jpeg()), ("a.cls", b"0"))
    whole = tar(*sample)
    for label in (b"2147483646", b"-1", b"9" * 5000, b"\xff\xfe", b"", b"1e3", b"0x10", b"1" * 70_000):
        yield f"label {label[:12]!r} of {len(label)}", tar(sample[0], ("a.cls", label))
    for number, text in enumerate(
        (b"[" * 60_000, b"{", b"[1]", b'{"label": {"a": 1}}', b'{"label": 1e999}', b"7" * 5000)
    ):
        yield f"json label {number}", tar(sample[0], ("a.json", text))
    yield "no label", tar(sample[0])
    yield "two images", tar(*sample, ("a.png", b"x"))
    yield "compressed", __import__("gzip").compress(whole)
    yield "text", b"not a tar file " * 60
    yield "empty", b""
    yield from cut(whole, 100, 511, 513, 700, 1600).items()
    for size in HUGE:
        for kind, name in (
            (b"0", "a.jpg"),
            (b"0", "a.cls"),
            (b"L", "long"),
            (b"x", "pax"),
            (b"g", "pax"),
            (b"S", "a.jpg"),
        ):
            yield f"{kind!r} {name} of {size} bytes", header(name, base256(size), kind) + whole
    for size in (-1, -512, -1024, -(2**62)):
        yield f"size {size}", header("a.jpg", base256(size)) + whole
        # Behind another member, a size of -512 leads back to the same header.
        yield f"size {size} behind another", whole[:1024] + header("b.jpg", base256(size)) + whole
    yield "size no number", header("a.jpg", b"zzzzzzz") + whole
    pax = {"size": "99999999999999999999", "GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**40)}
    for key, value in (*pax.items(), ("GNU.sparse.major", "1"), ("path", "\0"), ("size", "-512")):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            info = tarfile.TarInfo("a.cls")
            info.size, info.pax_headers = 1, {key: value}
            archive.addfile(info, io.BytesIO(b"0"))
        yield f"pax {key} = {value}", file.getvalue() + whole
    deep = b"".join(header("deep", b"%011o" % 0, b"L") for _ in range(3000))
    yield "long names without end", deep + whole


# Indexes, models and prototypes: safetensors ------------------------------------------------------------------------


def safetensors(head: dict[str, Any] | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def _damage_header(whole: bytes, wrong: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """A valid file with its header changed in many ways."""
    size = struct.unpack("<Q", whole[:8])[0]
    head, body = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    for number, changes in enumerate(wrong):
        for key in [k for k in head if k != "__metadata__"][:2]:
            yield f"{key} {number}", safetensors({**head, key: {**head[key], **changes}}, body)
    about = json.loads(head["__metadata__"]["dl2pa"]) if "dl2pa" in head.get("__metadata__", {}) else {}
    for key in about:
        for value in (-1, [1], {"a": 1}, "text", 2**62) if key != "words" else (-1, [1], "text", 2**62):
            metadata = {"dl2pa": json.dumps({**about, key: value})}
            yield f"{key} = {value}", safetensors({**head, "__metadata__": metadata}, body)
    yield "metadata no object", safetensors({**head, "__metadata__": {"dl2pa": "[1]"}}, body)
    yield "metadata nested", safetensors({**head, "__metadata__": {"dl2pa": "[" * 50_000}}, body)
    yield "header nested", safetensors(b"[" * 50_000)
    yield "header no JSON", safetensors(b"{" * 10)
    yield "no header", safetensors(b"{}")
    for length in HUGE:
        yield f"header of {length}", safetensors(head, body, length)
    yield "empty", b""
    yield "text", b"some text that is no such file"
    yield from cut(whole, 4, 8, 20, size, len(whole) - 1).items()
    yield from flipped(whole, 3, 6).items()


WRONG = [
    {"shape": [2**40]},
    {"shape": [-1]},
    {"shape": ["a"]},
    {"dtype": "F128"},
    {"dtype": "I32"},
    {"data_offsets": [0, 2**62]},
    {"data_offsets": [-8, 8]},
    {"data_offsets": [8, 0]},
    {"data_offsets": "0,8"},
]


def small_index(folder: Path) -> bytes:
    for half in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / half / name).mkdir(parents=True)
            (folder / half / name / "1.jpg").write_bytes(jpeg())
    build_index(folder, folder / "dl2pa.index", 1)
    return (folder / "dl2pa.index").read_bytes()


def small_model(folder: Path) -> bytes:
    from dl2pa.backbones import build_embedder

    embedder = build_embedder("resnet8", 5, widths=(4, 4, 4))
    tensors = {f"embedder.{k}": v for k, v in embedder.state_dict().items()}
    about = {
        "model": {
            "backbone": "resnet8",
            "embedding_dim": 5,
            "head": "linear",
            "shortcut": "conv",
            "widths": [4, 4, 4],
        },
        "classes": ["a", "b"],
        "scale": None,
        "preprocessing": {"resize_shorter_side": 8, "image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    folder.mkdir()
    file = folder / "model.safetensors"
    save_file({**tensors, "class_vectors": torch.eye(2, 5)}, file, {"dl2pa": json.dumps(about)})
    load_classifier(file)
    return file.read_bytes()


def models(whole: bytes) -> Iterator[tuple[str, bytes]]:
    yield from _damage_header(whole, WRONG)
    size = struct.unpack("<Q", whole[:8])[0]
    head, body = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    about = json.loads(head["__metadata__"]["dl2pa"])
    for key, value in (
        ("embedding_dim", 2**40),
        ("embedding_dim", -1),
        ("widths", [2**20, 2**20, 2**20]),
        ("widths", []),
        ("widths", [4, 4, 2**40]),
        ("backbone", "resnet152"),
        ("backbone", "list_models"),
        ("backbone", "__class__"),
        ("backbone", "resnetx"),
        ("head", "batchnorm"),
        ("shortcut", "none"),
    ):
        changed = {**about, "model": {**about["model"], key: value}}
        yield (
            f"model.{key} = {value}",
            safetensors({**head, "__metadata__": {"dl2pa": json.dumps(changed)}}, body),
        )


def npy(shape: str, body: bytes = b"", dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def prototypes() -> Iterator[tuple[str, bytes]]:
    for shape in (
        "(10, 1000000000000)",
        "(2147483647, 5)",
        "(4611686018427387904,)",
        "(-1, 5)",
        "(10, 5, 5)",
        "()",
        "'a'",
    ):
        yield f"{shape}.npy", npy(shape, GOOD)
    for dtype in ("|O", "<c8", "|S3", "<U999999999", "|V8"):
        yield f"{dtype.strip('<|')}.npy", npy("(10, 5)", GOOD, dtype)
    yield "header.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{"
    yield (
        "code.npy",
        b"\x93NUMPY\x01\x00" + struct.pack("<H", 60) + b"__import__('os').system('touch TRACE')".ljust(60),
    )
    yield "pickle.npy", pickle.dumps(np.eye(10, 5))
    yield "nan.npy", npy("(10, 5)", np.full((10, 5), np.nan, np.float32).tobytes())
    yield "zero.npy", npy("(10, 5)", bytes(200))
    archive = io.BytesIO()
    np.savez(archive, a=np.eye(3))
    yield "archive.npy", archive.getvalue()
    yield "cut.npy", npy("(10, 5)", GOOD[:-4])
    yield "empty.npy", b""
    yield "empty.pth", b""
    yield "text.pth", b"some text"
    yield "pickle.pth", pickle.dumps({"w": 1})
    file = io.BytesIO()
    torch.save({"w": torch.zeros(1).expand(2**40, 5)}, file)
    yield "expanded.pth", file.getvalue()
    file = io.BytesIO()
    torch.save({"w": torch.eye(5, 10).to_sparse()}, file)
    yield "sparse.pth", file.getvalue()
    file = io.BytesIO()
    torch.save([1, 2], file)
    yield "list.pth", file.getvalue()
    yield "cut.pth", file.getvalue()[:200]
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("archive/data.pkl", bytes(2**27))
    yield "bomb.pth", bomb.getvalue()
    yield "empty.safetensors", b""
    yield (
        "header.safetensors",
        safetensors({"points": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 200]}}, GOOD),
    )
    yield (
        "foreign.safetensors",
        safetensors({"points": {"dtype": "F32", "shape": [10, 5], "data_offsets": [0, 200]}}, GOOD),
    )


# Pickles and arrays of published data sets --------------------------------------------------------------------------


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self._called = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._called


def cifar() -> Iterator[tuple[str, bytes]]:
    good = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}, protocol=2)
    yield (
        "system",
        pickle.dumps({"data": Calls(subprocess.getoutput, "touch TRACE"), "labels": [0]}, protocol=2),
    )
    yield "eval", pickle.dumps({"data": Calls(eval, "1"), "labels": [0]}, protocol=2)
    yield "a place far away", b"\x80\x02}r\xff\xff\xff\x7f."
    yield "an own place far away", b"\x80\x02}p2147483647\n."
    yield "bytes without end", b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x."
    yield "text without end", b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x."
    yield "a frame without end", b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}."
    yield (
        "an array without end",
        pickle.dumps(
            {"data": Calls(np.empty(0).__reduce__()[0], np.ndarray, (2**40,), b"B"), "labels": [0]},
            protocol=2,
        ),
    )
    yield "another encoding", b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."
    yield "nested", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    yield (
        "objects",
        pickle.dumps({"data": np.array([object], dtype=object).astype(str), "labels": [0]}, protocol=2),
    )
    yield "no dictionary", pickle.dumps([1, 2], protocol=2)
    yield "empty", b""
    yield "text", b"no pickle"
    yield from cut(good, 1, 10, 60, len(good) - 2).items()
    yield from flipped(good, 5, 8).items()


def mats() -> Iterator[tuple[str, bytes]]:
    from scipy.io import savemat

    file = io.BytesIO()
    savemat(file, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [2]])})
    whole = file.getvalue()
    yield "empty", b""
    yield "text", b"no MATLAB file" * 20
    yield from cut(whole, 20, 128, 140, 300).items()
    for place in (128 + 4, 128 + 36):
        for size in (0x7FFFFFFF, 0):
            yield f"{size} at {place}", whole[:place] + struct.pack("<I", size) + whole[place + 4 :]


def configs() -> Iterator[tuple[str, bytes]]:
    laughs = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    yield "a billion laughs", laughs.encode()
    yield "a billion laughs at a field", (laughs + "train: {epochs: *a11}\n").encode()
    yield "itself", b"data: &a {root: *a}\n"
    yield "nested", b"data: " + b"[" * 5_000
    yield "code", b"data: !!python/object/apply:os.system ['touch TRACE']\n"
    yield "binary", bytes(range(256))
    yield "a number", b"7"
    yield "a long number", b"train: {epochs: " + b"9" * 20_000 + b"}"
    yield "empty key", b"? \n: 1\n"
    yield "a list", b"- 1\n- 2\n"
    yield "a tag", b"train: !!timestamp 9999-99-99\n"
    yield "infinite", b"optim: {lr: .inf}\n"


# What reads them ----------------------------------------------------------------------------------------------------


def _cases(place: Path) -> Iterator[tuple[str, Callable[[], Any], bool]]:
    """A function to call, and whether it may count a file as bad instead of refusing it."""

    def written(kind: str, name: str, data: bytes, ending: str) -> Path:
        folder = place / kind / f"{len(list((place / kind).iterdir())) if (place / kind).exists() else 0}"
        folder.mkdir(parents=True)
        path = folder / ending
        path.write_bytes(data)
        return path

    for name, data in images():
        path = written("image", name, data, "1.jpg")
        yield f"image {name}", lambda path=path: load_image(path, **PREPROCESSING), False
        folder = written("folder", name, data, "ignored").parent
        (folder / "cat").mkdir()
        (folder / "ignored").rename(folder / "cat/1.jpg")
        yield f"indexed image {name}", lambda f=folder: counted(f), True
    for name, data in shards():
        path = written("shard", name, data, "train-0.tar")
        yield f"shard {name}", lambda f=path.parent: counted(f), True
    whole = small_index(place / "indexed")
    for name, data in _damage_header(whole, WRONG):
        path = written("index", name, data, "dl2pa.index")
        yield f"index {name}", lambda p=path: open_index(p, place / "indexed"), False
    for name, data in models(small_model(place / "model")):
        path = written("a model", name, data, "model.safetensors")
        yield f"model {name}", lambda p=path: load_classifier(p), False
    for name, data in prototypes():
        path = written("prototypes", name, data, name)
        yield f"prototypes {name}", lambda p=path: load_prototypes(p, 10, 5), False
    meta = pickle.dumps({"label_names": [str(k) for k in range(10)]}, protocol=2)
    for name, data in cifar():
        path = written("cifar", name, data, "test_batch")
        path.with_name("batches.meta").write_bytes(meta)
        yield f"CIFAR {name}", lambda p=path: load_cifar10(p.parent, "val"), False
        second = written("cifar meta", name, data, "batches.meta")
        second.with_name("test_batch").write_bytes(meta)
        yield f"CIFAR's meta {name}", lambda p=second: load_cifar10(p.parent, "val"), False
    for name, data in mats():
        path = written("svhn", name, data, "test_32x32.mat")
        yield f"SVHN {name}", lambda p=path: load_svhn(p.parent, "val"), False
    for name, data in (("short", b"x" * 100), ("empty", b"")):
        path = written("stl10", name, data, "test_X.bin")
        path.with_name("test_y.bin").write_bytes(b"\1")
        path.with_name("class_names.txt").write_bytes(b"\xff\xfe\xff" if name == "empty" else b"a b")
        yield f"STL-10 {name}", lambda p=path: load_stl10(p.parent, "val"), False
    for name, data in configs():
        path = written("config", name, data, "config.yaml")
        yield f"configuration {name}", lambda p=path: load_config(p), False
    for kind, make in (("pipe", os.mkfifo), ("folder", Path.mkdir)):
        path = place / f"{kind}.safetensors"
        make(path)
        yield f"{kind} as index", lambda p=path: open_index(p, place), False
        yield f"{kind} as model", lambda p=path: load_classifier(p), False
        yield f"{kind} as prototypes", lambda p=path: load_prototypes(p, 10, 5), False
        yield f"{kind} as image", lambda p=path: load_image(p, **PREPROCESSING), False
        yield f"{kind} as configuration", lambda p=path: load_config(p), False
        shard = place / f"{kind} shards/train.tar"
        shard.parent.mkdir()
        make(shard)
        yield f"{kind} as shard", lambda p=shard.parent: counted(p), True
        image = place / f"{kind} images/cat/1.jpg"
        image.parent.mkdir(parents=True)
        make(image)
        yield f"{kind} in a class folder", lambda p=image.parents[1]: counted(p), True
    sparse = place / "sparse/cat/1.jpg"
    sparse.parent.mkdir(parents=True)
    with sparse.open("wb") as file:
        file.write(jpeg())
        file.truncate(2**40)
    yield "an image of a terabyte", lambda: counted(sparse.parents[1]), True


def counted(root: Path) -> bool:
    """Index a folder; return whether an image was counted as bad."""
    index = build_index(root, root / "out.index", 1)
    return any(split.flags.any() for split in index.splits.values())


# Reading each ---------------------------------------------------------------------------------------------------


def outcome(call: Callable[[], Any], may_count: bool, trace: Path) -> str:
    """Run a call in a process with little time and memory; return what is wrong, or an empty text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.chdir(trace.parent)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
        signal.alarm(SECONDS)
        try:
            found = call()
            said = "" if may_count and found else f"accepted: {found!r}"
        except UserError as error:
            said = "" if len(str(error)) < 2000 else f"a message of {len(str(error))} characters"
        except BaseException:
            said = traceback.format_exc()[-1500:]
        os.write(writer, said.encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        said = told.read().decode()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0 and trace.exists():
        return "it ran what the file said"
    return said if code == 0 else f"{said} ended by {code}"


def main(place: Path) -> None:
    """Print the failures per file as JSON; run by tests/unit/test_malformed_files.py.

    In a process of its own, for it forks: with the threads of other tests a child could inherit a held lock.
    """
    trace = place / "work/TRACE"
    trace.parent.mkdir()
    cases = list(_cases(place / "files"))
    wrong = {name: said for name, call, may_count in cases if (said := outcome(call, may_count, trace))}
    sys.stdout.write(json.dumps({"tried": len(cases), "wrong": wrong}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
