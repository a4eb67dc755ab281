"""Labels of samples in tar shards: a number is a position in the class list, other text is a class name."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dl2pa.errors import UserError
from pipelines.datasets.classes import nearest
from pipelines.datasets.text import decode_text

Label = int | str

_MAX_CLASSES = 2**20
"""Maximum number of classes without a class list: a name is created for each."""
_NUMBER = re.compile(r"(\d{1,18})(?:\.0*)?", re.ASCII)


def parse_label(content: bytes, suffix: str) -> Label | None:
    """The label in a ``.cls`` or ``.json`` file; None if a ``.json`` has no label.

    A label in JSON may be an integer, a number such as 1.0, a text, or a list of one of these.

    Raises:
        ValueError: it is not a label.
    """
    text = decode_text(content).strip()
    if suffix == "cls":
        return text
    value: Any = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    value = value.get("label")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if not isinstance(value, str):
        raise ValueError(f"its label {json.dumps(value)[:80]} is neither one number nor one text")
    return value.strip()


def number_labels(
    labels: Collection[Label], classes: tuple[str, ...] | None, root: Path, *, positions: bool = False
) -> Mapping[Label, int]:
    """Position in the class list of each distinct label.

    A text of digits is a position. If it is also the name of a class at another position, it is a name if the
    labels cannot be positions, and a position if they cannot be names.

    Args:
        labels: the distinct labels of all splits.
        classes: the class list; without one, labels are numbers.
        root: the folder of the shards, for messages.
        positions: texts of digits are positions, whatever the names of the classes.

    Raises:
        UserError: a label has no class, or has two meanings (``ROOT``).
    """
    position_of = {name: position for position, name in enumerate(classes or ())}
    end = len(classes) if classes else _MAX_CLASSES
    numbers = {label: number for label in labels if (number := _number(label)) is not None}
    names = {label for label in labels if label not in numbers}
    if not positions and _are_names(numbers, position_of, end, root):
        names |= {label for label in numbers if isinstance(label, str)}
    result: dict[Label, int] = {}
    for label in labels:
        number = position_of.get(str(label)) if label in names else numbers[label]
        if number is None or not 0 <= number < end:
            raise _unknown(label, classes, min(numbers.values(), default=0), root)
        result[label] = number
    return result


def number_known(
    train: Collection[Label], others: Collection[Label], classes: tuple[str, ...] | None, root: Path
) -> tuple[Mapping[Label, int], tuple[str, ...]]:
    """Position of each distinct label that has a class, and the class names; labels that are missing have none.

    Without a class list, the classes are those of the training split: 0, 1, 2, … if most of its labels are numbers,
    else its labels, sorted as text.

    Args:
        train, others: the distinct labels of the training split and of the others.

    Raises:
        UserError: the labels have two meanings, or a number is too large (``ROOT``).
    """
    if classes is None:
        numbers = [number for label in train if (number := _number(label)) is not None and number >= 0]
        if 2 * len(numbers) < len(train):
            classes = tuple(sorted({str(label) for label in train}))
            return {label: k for k, label in enumerate(classes)}, classes
        end = 1 + max(numbers, default=0)
        if end > _MAX_CLASSES:
            raise _unknown(max(numbers), None, 0, root)
        classes = tuple(str(k) for k in range(end))
    known = set(classes)
    labels = {*train, *others}
    with_class = {
        label
        for label in labels
        if label in known or ((number := _number(label)) is not None and 0 <= number < len(classes))
    }
    return number_labels(with_class, classes, root), classes


def _are_names(numbers: dict[Label, int], position_of: dict[str, int], end: int, root: Path) -> bool:
    """Whether the texts of digits among the labels are names of classes.

    Raises:
        UserError: they can be both, with different meanings (``ROOT``).
    """
    texts = [label for label in numbers if isinstance(label, str)]
    different = [text for text in texts if position_of.get(text, numbers[text]) != numbers[text]]
    if not different:
        return False
    can_be_positions = all(numbers[text] < end for text in texts)
    can_be_names = all(text in position_of for text in texts)
    if can_be_positions and can_be_names:
        text = min(different)
        message = (
            f"the label {text!r} has two meanings: the class at position {numbers[text]}, and the class named "
            f"{text!r} at position {position_of[text]}"
        )
        remedy = (
            "If the labels are positions, use names in the class list that are not numbers; "
            "if they are names, remove the class list."
        )
        raise UserError("ROOT", str(root), message, remedy)
    return can_be_names


def _number(label: Label) -> int | None:
    if isinstance(label, int):
        return label
    match = _NUMBER.fullmatch(label)
    return int(match[1]) if match else None


def _unknown(label: Label, classes: tuple[str, ...] | None, smallest: int, root: Path) -> UserError:
    if classes is None:
        message = f"the label {str(label)!r} is not among numbers from 0 to {_MAX_CLASSES - 1}"
        remedy = "Add classes.txt next to the shards: one class per line in label order."
        return UserError("ROOT", str(root), message, remedy)
    hint = nearest(str(label), classes)
    message = f"the label {str(label)!r} is not among the {len(classes):,} classes of the class list{hint}"
    remedy = "Correct the class list (classes.txt or classes.json) next to the shards."
    if _number(label) == len(classes) and smallest > 0:
        remedy = "Labels start at 0. If these start at 1, add a class at the beginning of the class list."
    return UserError("ROOT", str(root), message, remedy)
