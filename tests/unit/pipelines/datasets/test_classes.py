from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dl2pa.errors import UserError
from pipelines.datasets import ArrayDataset, check_num_classes, load_classes, open_dataset
from pipelines.datasets.build_index import build_index
from pipelines.datasets.classes import ClassList, nearest, read_words
from pipelines.datasets.index import INDEX_NAME

FIVE = ArrayDataset(np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1, np.int64), tuple("abcde"), "0" * 16)


def test_none_uses_the_classes_of_the_data_set() -> None:
    assert load_classes(None) is None


def test_list_keeps_its_order() -> None:
    assert load_classes(["zebra", "polar bear", "ant"]) == ("zebra", "polar bear", "ant")


@pytest.mark.parametrize("as_type", [str, Path])
def test_file_has_one_class_per_line(tmp_path: Path, as_type: Callable[[Path], str | Path]) -> None:
    file = tmp_path / "classes.txt"
    file.write_text(
        "\ufeff# order of the paper\nn02 tench, Tinca tinca\n\n  n01\r\n#n09\nn03\tgoldfish\n", "utf-8"
    )
    assert load_classes(as_type(file)) == ("n02", "n01", "n03")


@pytest.mark.parametrize(
    ("lines", "present", "names"),
    [
        ("n01 tench, Tinca tinca\nn02 goldfish", (), ("n01", "n02")),
        ("polar bear\nbrown bear", (), ("polar", "brown")),
        ("polar bear\nbrown bear", ("polar bear",), ("polar bear", "brown bear")),
        ("golden retriever\ngolden eagle", (), ("golden retriever", "golden eagle")),
        ("golden retriever\ta dog\ncat\ta pet", ("golden retriever",), ("golden retriever", "cat")),
        ("1 001.Albatross\n2 002.Crow", ("001.Albatross", "002.Crow"), ("001.Albatross", "002.Crow")),
        ("ant\u2028colony\rbee", ("ant\u2028colony",), ("ant\u2028colony", "bee")),
    ],
)
def test_lines_of_several_words_are_read_as_in_the_data(
    tmp_path: Path, lines: str, present: tuple[str, ...], names: tuple[str, ...]
) -> None:
    (tmp_path / "classes.txt").write_text(lines, encoding="utf-8")
    assert ClassList.load(tmp_path / "classes.txt").names(lambda: present) == names


@pytest.mark.parametrize("indexed", [False, True])
def test_class_list_with_several_words_fits_the_folders(tmp_path: Path, indexed: bool) -> None:
    root, file = tmp_path / "pets", tmp_path / "classes.txt"
    for name in ("train/polar bear/1.jpg", "train/cat/2.jpg", "val/cat/3.jpg"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(b"image")
    file.write_text("polar bear\ncat\n", encoding="utf-8")
    if indexed:
        build_index(root, root / INDEX_NAME, 1)
    for split, labels in (("train", [1, 0]), ("val", [1])):
        dataset = open_dataset("imagefolder", root, None, file, split)  # type: ignore[arg-type]
        assert dataset.classes == ("polar bear", "cat")
        assert dataset.labels.tolist() == labels


def test_other_unicode_form_of_a_class_name_is_named() -> None:
    assert (
        nearest("cafe\u0301", ["cat", "caf\u00e9"])
        == "; 'caf\u00e9' is the same text in another Unicode form"
    )


def test_utf_16_with_a_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes("gr\u00fcn\nrot".encode("utf-16"))
    assert load_classes(tmp_path / "classes.txt") == ("gr\u00fcn", "rot")


def test_word_list_that_is_not_utf_8_only_costs_the_readable_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "words.txt").write_bytes(b"ant caf\xe9\n")
    assert read_words(tmp_path, ["ant"]) == {}
    assert "words.txt: it is not UTF-8 text (byte 7)" in caplog.text
    (tmp_path / "words.txt").write_bytes(b"\xef\xbb\xbfant an insect\n")
    assert read_words(tmp_path, ["ant"]) == {"ant": "an insect"}


def test_imagenet_synsets(shared_data: Callable[[str], Path]) -> None:
    classes = load_classes(shared_data("semantic/imagenet_synsets.txt"))
    assert classes is not None
    assert (len(classes), classes[0], classes[-1]) == (1000, "n01440764", "n15075141")


def test_repeated_class_is_refused() -> None:
    with pytest.raises(UserError, match="more than once") as caught:
        load_classes(["a", "b", "c", "b"])
    assert (caught.value.field, caught.value.value) == ("data.classes", "b")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"# nothing\n\n", "contains no class names"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"caf\xe9", "not UTF-8"),
        (b"a\0b\0\n\0", "not text"),
        (b"cat\0", "not text"),
    ],
)
def test_invalid_file_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "classes.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_classes(str(file))
    assert (caught.value.field, caught.value.value) == ("data.classes", str(file))


def test_empty_list_is_refused() -> None:
    with pytest.raises(UserError, match="contains no class names"):
        load_classes([])


@pytest.mark.parametrize("num_classes", [None, 5])
def test_correct_number_of_classes_is_accepted(num_classes: int | None) -> None:
    check_num_classes(FIVE, num_classes)


def test_wrong_number_of_classes_is_refused() -> None:
    with pytest.raises(UserError, match="has 5 classes") as caught:
        check_num_classes(FIVE, 10)
    assert (caught.value.field, caught.value.value) == ("data.num_classes", 10)
    assert "data.num_classes=5" in caught.value.remedy
