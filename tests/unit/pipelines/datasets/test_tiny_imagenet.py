from collections.abc import Callable
from pathlib import Path

import pytest

from dl2pa.errors import UserError
from pipelines.datasets import Split, index_folder
from pipelines.datasets.tiny_imagenet import index_tiny_imagenet

ANNOTATIONS = {"val_0.JPEG": "n03", "val_10.JPEG": "n01", "val_2.JPEG": "n03"}


@pytest.fixture
def tiny(image_tree: Callable[..., Path]) -> Path:
    train = [f"train/{wnid}/images/{wnid}_{i}.JPEG" for wnid in ("n03", "n01", "n02") for i in (0, 1)]
    boxes = [f"train/{wnid}/{wnid}_boxes.txt" for wnid in ("n03", "n01", "n02")]
    root = image_tree("tiny-imagenet-200", *train, *boxes, *(f"val/images/{name}" for name in ANNOTATIONS))
    (root / "wnids.txt").write_text("n03\nn01\nn02\n")
    annotate(root, ANNOTATIONS)
    return root


def annotate(root: Path, wnid_of: dict[str, str]) -> None:
    lines = [f"{name}\t{wnid}\t0\t32\t44\t62\n" for name, wnid in wnid_of.items()]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))


def refused(root: Path, split: Split, words: str) -> UserError:
    with pytest.raises(UserError, match=words) as caught:
        index_tiny_imagenet(root, split)
    return caught.value


def test_training_split_is_an_image_folder(tiny: Path) -> None:
    dataset = index_tiny_imagenet(tiny.parent, "train")
    assert dataset.classes == ("n01", "n02", "n03")
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.files[0] == "n01/images/n01_0.JPEG"
    assert dataset.fingerprint == index_folder(tiny / "train", None, "data.root").fingerprint


def test_validation_labels_are_the_annotations(tiny: Path) -> None:
    dataset = index_tiny_imagenet(tiny, "val")
    assert list(dataset.files) == ["images/val_0.JPEG", "images/val_10.JPEG", "images/val_2.JPEG"]
    assert dataset.labels.tolist() == [2, 0, 2]
    assert dataset.classes == ("n01", "n02", "n03")
    assert dataset.read(1) == b"val/images/val_10.JPEG"


def test_class_list_sets_the_labels_of_both_splits(tiny: Path) -> None:
    order = ["n03", "n02", "n01"]
    assert index_tiny_imagenet(tiny, "train", order).labels.tolist() == [2, 2, 1, 1, 0, 0]
    assert index_tiny_imagenet(tiny, "val", order).labels.tolist() == [0, 2, 0]


def test_images_and_annotations_must_match(tiny: Path) -> None:
    annotate(tiny, {**ANNOTATIONS, "val_3.JPEG": "n01"})
    assert refused(tiny, "val", "val_3.JPEG does not exist").field == "data.root"
    annotate(tiny, {"val_0.JPEG": "n03"})
    refused(tiny, "val", r"val_10.JPEG has no label \(2 such names\)")
    annotate(tiny, {**ANNOTATIONS, "val_0.JPEG": "n3"})
    assert refused(tiny, "val", "'n3' .*nearest is 'n03'").field == "data.classes"
    (tiny / "val" / "val_annotations.txt").write_text("val_0.JPEG\n")
    refused(tiny, "val", "line 1")


@pytest.mark.parametrize(("split", "missing"), [("train", "wnids.txt"), ("val", "val/val_annotations.txt")])
def test_missing_files(tiny: Path, split: Split, missing: str) -> None:
    (tiny / missing).unlink()
    assert "tiny-imagenet-200.zip" in refused(tiny.parent, split, f"no file .*{missing}").remedy
