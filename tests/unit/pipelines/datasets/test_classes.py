from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dl2pa.errors import UserError
from pipelines.datasets import ArrayDataset, check_num_classes, load_classes

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
    [(None, "No such file"), (b"# nothing\n\n", "contains no class names"), (b"\xff\xfe\x00", "not UTF-8")],
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
