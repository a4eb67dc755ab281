import io
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dl2pa.errors import UserError
from pipelines.datasets import ImageTable, index_folder, write_digits
from pipelines.datasets.digits import has_digits, held_out


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "new" / "digits")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first thirty scans, for fast tests."""
    import sklearn.datasets

    scans = sklearn.datasets.load_digits()
    scans.images, scans.target = scans.images[:30], scans.target[:30]
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: scans)


def splits(root: Path) -> tuple[ImageTable, ImageTable]:
    return index_folder(root / "train", None, "data.root"), index_folder(root / "val", None, "data.root")


def test_a_fifth_of_each_class_is_for_validation(digits: Path) -> None:
    train, val = splits(digits)
    assert train.classes == val.classes == tuple("0123456789")
    names = [Path(path).name for path in (*train.files, *val.files)]
    assert sorted(names) == [f"{i:04d}.jpeg" for i in range(1797)]
    per_class = np.bincount(train.labels) + np.bincount(val.labels)
    assert (np.abs(np.bincount(val.labels) - 0.2 * per_class) <= 0.5).all()


def test_images_are_the_enlarged_scans(digits: Path) -> None:
    from sklearn.datasets import load_digits

    scans = load_digits()
    _, val = splits(digits)
    for i in range(0, len(val), 20):
        number = int(val.path(i).stem)
        image = Image.open(io.BytesIO(val.read(i)))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
        assert scans.target[number] == val.labels[i]
        small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)).ravel()
        assert np.corrcoef(small, scans.images[number].ravel())[0, 1] > 0.97


def test_split_never_changes() -> None:
    labels = np.arange(50) % 5
    assert np.flatnonzero(held_out(labels, seed=0)).tolist() == [1, 2, 4, 9, 17, 18, 35, 36, 43, 45]
    assert held_out(labels, seed=1).sum() == 10
    assert (held_out(labels, seed=0) != held_out(labels, seed=1)).any()


def test_complete_folder_is_left_unchanged(digits: Path, caplog: pytest.LogCaptureFixture) -> None:
    removed = next((digits / "val" / "3").iterdir())
    content = removed.read_bytes()
    removed.unlink()
    try:
        assert write_digits(digits) == digits
        assert not removed.exists()
        with caplog.at_level(logging.WARNING):
            write_digits(digits, size=64)
        assert "left unchanged" in caplog.text
    finally:
        removed.write_bytes(content)


def test_damaged_marker_is_no_traceback(few: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_digits(tmp_path / "digits")
    (root / "digits.json").write_text("")
    assert write_digits(root) == root
    assert "left unchanged" in caplog.text


def test_size_and_seed(few: None, tmp_path: Path) -> None:
    large, other = write_digits(tmp_path / "large", size=48), write_digits(tmp_path / "other", seed=1)
    assert Image.open(next((large / "train" / "0").iterdir())).size == (48, 48)
    assert list(splits(large)[1].files) != list(splits(other)[1].files)


def test_concurrent_callers_get_one_complete_folder(few: None, tmp_path: Path) -> None:
    start = threading.Barrier(4)

    def write(_: int) -> int:
        start.wait()
        return sum(len(split) for split in splits(write_digits(tmp_path / "digits")))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, range(4))) == [30] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_failure_leaves_no_files(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.datasets.digits._move_into_place", no_space)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_empty_folder_is_filled(few: None, tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    assert has_digits(write_digits(tmp_path / "digits"))


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for root, words in [
        (tmp_path, "contains files that are not"),
        (tmp_path / "thesis.tex", "not a directory"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            write_digits(root)
        assert (caught.value.field, caught.value.value) == ("data.root", str(root))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
