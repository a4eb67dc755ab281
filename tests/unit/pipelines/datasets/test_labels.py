"""Labels of shards: a number is a position, a name is a name, and ambiguity is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dl2pa.errors import UserError
from pipelines.datasets import ImageTable, open_dataset
from pipelines.datasets.build_index import build_index, list_source
from pipelines.datasets.index import INDEX_NAME, Index
from pipelines.datasets.labels import Label, number_labels, parse_label
from pipelines.datasets.pack import PackOptions, pack
from pipelines.datasets.shards import UNVERIFIED_NAME

ROOT = Path("set")
DIGITS = tuple(sorted(str(k) for k in range(12)))
"""The classes of folders named 0 to 11: sorted as text, 10 and 11 come before 2."""


def build(root: Path) -> Index:
    return build_index(root, root / INDEX_NAME, 1)


@pytest.mark.parametrize(
    ("content", "suffix", "label"),
    [
        (b"7\n", "cls", "7"),
        (b"\xef\xbb\xbf7\r\n", "cls", "7"),
        ("7".encode("utf-16"), "cls", "7"),
        ("gr\u00fcn".encode(), "cls", "gr\u00fcn"),
        (b'{"label": 7}', "json", 7),
        (b'\xef\xbb\xbf{"label": 7}', "json", 7),
        (b'{"label": 7.0}', "json", 7),
        (b'{"label": [7]}', "json", 7),
        (b'{"label": "7"}', "json", "7"),
        (b'{"label": ["cat"]}', "json", "cat"),
        (b'{"label": null}', "json", None),
        (b'{"caption": "a cat"}', "json", None),
    ],
)
def test_unambiguous_label_is_read(content: bytes, suffix: str, label: Label | None) -> None:
    assert parse_label(content, suffix) == label


@pytest.mark.parametrize(
    "content", ['{"label": [1, 2]}', '{"label": 1.5}', '{"label": true}', '{"label": {"id": 1}}', "[1]", "{"]
)
def test_other_json_label_is_refused(content: str) -> None:
    with pytest.raises(ValueError):
        parse_label(content.encode(), "json")


def test_label_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(ValueError, match="not UTF-8"):
        parse_label(b"caf\xe9", "cls")


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (["0", "2", 1], ("cat", "dog", "emu"), [0, 2, 1]),
        (["1.0", "002"], ("cat", "dog", "emu"), [1, 2]),
        (["dog", "0"], ("cat", "dog"), [1, 0]),
        (["5", "2"], None, [5, 2]),
        # Positions and names agree.
        (["0", "1"], ("0", "1", "2"), [0, 1]),
        # Too large to be positions.
        (["10", "30"], ("10", "20", "30"), [0, 2]),
        # "0" is not the name of a class.
        (["0", "1"], ("1", "5"), [0, 1]),
        # A number in JSON is a position.
        ([2, 10], DIGITS, [2, 10]),
    ],
)
def test_number_is_a_position_and_name_is_a_name(
    labels: list[Label], classes: tuple[str, ...] | None, numbers: list[int]
) -> None:
    result = number_labels(set(labels), classes, ROOT)
    assert [result[label] for label in labels] == numbers


def test_label_with_two_meanings_is_refused() -> None:
    with pytest.raises(
        UserError, match="the label '2' has two meanings: the class at position 2, and"
    ) as caught:
        number_labels({"0", "2"}, DIGITS, ROOT)
    assert "remove the class list" in caught.value.remedy
    assert number_labels({"0", "2"}, DIGITS, ROOT, positions=True) == {"0": 0, "2": 2}


@pytest.mark.parametrize(
    ("label", "remedy"),
    [("3", "start at 1"), ("-1", "class list"), (-1, "class list"), ("dgo", "class list")],
)
def test_label_without_a_class_is_refused(label: Label, remedy: str) -> None:
    with pytest.raises(UserError, match="not among the 3 classes") as caught:
        number_labels({label}, ("cat", "dog", "emu"), ROOT)
    assert remedy in caught.value.remedy


def test_remedies_for_two_meanings_work(tar_file: Callable[..., Path], picture: bytes) -> None:
    root = tar_file(
        "set/train-0.tar",
        {f"{k}.{s}": d for k in (0, 10) for s, d in (("jpg", picture), ("cls", str(k).encode()))},
    ).parent
    (root / "classes.txt").write_text("\n".join(DIGITS))
    with pytest.raises(UserError, match="two meanings"):
        build(root)
    (root / "classes.txt").write_text("\n".join(f"digit-{name}" for name in DIGITS))
    index = build(root)
    assert [index.classes[label] for label in index.splits["train"].table.labels] == ["digit-0", "digit-8"]
    (root / "classes.txt").unlink()
    index = build(root)
    assert [index.classes[label] for label in index.splits["train"].table.labels] == ["0", "10"]


@pytest.mark.parametrize(
    "content",
    [
        '{"cat": "a pet", "dog": ""}',
        '["cat", "dog"]',
        '{"dog": 1, "cat": 0}',
        '\ufeff{"cat": "", "dog": ""}',
    ],
)
def test_class_list_in_json(tar_file: Callable[..., Path], picture: bytes, content: str) -> None:
    root = tar_file("set/train-0.tar", {"a.jpg": picture, "a.cls": b"dog"}).parent
    (root / "classes.json").write_text(content, encoding="utf-8")
    assert build(root).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"cat": "", "cat": ""}', "'cat' appears more than once"),
        (b'["cat", "cat"]', "'cat' appears more than once"),
        (b'{"cat": 1, "dog": 2}', "not 0, 1, 2"),
        (b'{"0": ["n01440764", "tench"]}', "not text"),
        (b"{}", "no class names"),
        (b'"cat"', "neither a JSON object nor a list"),
        (b'{"caf\xe9": ""}', "not UTF-8"),
        (rb'{"\ud800": ""}', "not text"),
    ],
)
def test_other_class_list_in_json_is_refused(
    tar_file: Callable[..., Path], picture: bytes, content: bytes, words: str
) -> None:
    root = tar_file("set/train-0.tar", {"a.jpg": picture, "a.cls": b"0"}).parent
    (root / "classes.json").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        build(root)
    assert (caught.value.field, caught.value.value) == ("ROOT", str(root / "classes.json"))


def test_split_of_shards_without_images_is_refused_with_counts(
    tar_file: Callable[..., Path], picture: bytes
) -> None:
    root = tar_file("set/train-0.tar", {"a.jpg": picture, "a.cls": b"0"}).parent
    tar_file("set/val-0.tar", {"a.gif": b"GIF89a", "a.cls": b"0"})
    with pytest.raises(
        UserError, match=r"split 'val' contain no images \(skipped: GIF image: 1 \(val-0.tar/a.gif\)"
    ):
        build(root)


@pytest.fixture
def numbered(image_tree: Callable[..., Path]) -> Path:
    """Class folders 0 to 11 with one image per split."""
    return image_tree("numbered", *(f"{split}/{k}/{k}.jpg" for split in ("train", "val") for k in range(12)))


def run_pack(root: Path, out: Path) -> None:
    pack(list_source(root), out, PackOptions(), 1, lambda done, total: None)


def test_classes_named_by_digits_are_packed(numbered: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    run_pack(numbered, out)
    for split in ("train", "val"):
        table = open_dataset("imagefolder", out, None, None, split)  # type: ignore[arg-type]
        assert isinstance(table, ImageTable)
        names = [table.classes[label] for label in table.labels]
        assert [table.read(i).decode() for i in range(12)] == [f"{split}/{k}/{k}.jpg" for k in names]
    (out / INDEX_NAME).unlink()
    assert build(out).classes == DIGITS


def test_unverified_packing_is_neither_indexed_nor_trained_on(
    numbered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.datasets import pack as packing

    out = tmp_path / "packed"
    run_pack(numbered, out)

    def differs(*_: Any) -> None:
        raise UserError("OUT", str(out), "differs", "")

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_compare", differs)
        with pytest.raises(UserError, match="differs"):
            run_pack(numbered, out)
    assert (out / INDEX_NAME).exists()
    for split, val_root, field in (("train", None, "data.root"), ("val", out, "data.val_root")):
        with pytest.raises(UserError, match="incomplete or have failed their verification") as caught:
            open_dataset("imagefolder", out, val_root, None, split)  # type: ignore[arg-type]
        assert caught.value.field == field
    run_pack(numbered, out)
    assert not (out / UNVERIFIED_NAME).exists()
    assert len(open_dataset("imagefolder", out, None, None, "train").labels) == 12


def test_lost_class_names_are_restored_by_packing_again(numbered: Path, tmp_path: Path) -> None:
    """An interruption may have come between pack.json and classes.json."""
    out = tmp_path / "packed"
    run_pack(numbered, out)
    names = json.loads((out / "classes.json").read_text())
    (out / "classes.json").unlink()
    run_pack(numbered, out)
    assert json.loads((out / "classes.json").read_text()) == names
