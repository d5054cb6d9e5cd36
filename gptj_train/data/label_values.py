"""Names of labels, and the values that stand for them in files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptj_train.counted import counted
from gptj_train.data.labelled_files import LabelledFields, LabelledRecord
from gptj_train.errors import UserError

_WHOLE = re.compile(r"(\d+)\.0+")  # as pandas writes whole numbers of a column in which one was missing


def regression_names(first: LabelledRecord, labels: Sequence[str] | None, fields: LabelledFields) -> list[str]:
    """Return the names of the numbers to regress on: ``labels``, or those of their fields."""
    width = len(numbers(first))
    if labels:
        names = [str(name) for name in labels]
    elif len(fields.label_fields) == width:
        names = fields.label_fields
    else:
        # A single field with a list of numbers.
        names = [f"{fields.label_fields[0]}_{number}" for number in range(width)]
    if len(names) != width:
        raise UserError(
            f"task.labels has {counted(len(names), 'name')}, but {first.where} has {counted(width, 'number')}"
        )
    return names


def label_names(
    records: list[LabelledRecord], labels: Sequence[str] | None, problem_type: str, fields: LabelledFields
) -> list[str]:
    """Return the names of the labels in the order of their ids.

    Raises:
        UserError: fewer than two, or one twice.
    """
    if labels:
        names = [str(name) for name in labels]
    elif isinstance(fields.label_field, str):
        names = names_in(records, problem_type)
    else:
        names = fields.label_field
    fewest = 1 if problem_type.startswith("multi") else 2
    if len(set(names)) < max(len(names), fewest):
        raise UserError(f"the labels are {names}; two or more different ones are needed: check data.label_field")
    return names


def names_in(records: list[LabelledRecord], problem_type: str) -> list[str]:
    """Return the labels that occur: numbers first, in numerical order, then names in alphabetical order."""
    names = set()
    for record in records:
        names |= {text_of(label) for label in listed_labels(record, problem_type)}
    if all(name.isdecimal() or _WHOLE.fullmatch(name) for name in names):
        # A csv has no types: "1.0" is a number where all are, and a name, such as a version, beside other names.
        names = {_WHOLE.sub(r"\1", name) for name in names}
    numbers = sorted((name for name in names if name.isdecimal()), key=lambda name: (int(name), name))
    return numbers + sorted(name for name in names if not name.isdecimal())


def text_of(label: Any) -> str:
    """Return the name of a label; a whole number is one class, written as 1 or as 1.0."""
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label)


def listed_labels(record: LabelledRecord, problem_type: str) -> list[Any]:
    """Return the labels of a record as a list, as they are in the file.

    Raises:
        UserError: no list where several labels are wanted, or no single name or whole number where one is.
    """
    several = problem_type == "multi_label_classification"
    label = record.label
    if isinstance(label, list) != several:
        wanted = "a list of labels" if several else "a name or a number"
        hint = "; task=multi_label learns several labels for each text"
        if several:
            hint = "; in a csv give a column of 0 and 1 for each label, data.label_field=[a,b,c]"
        raise UserError(f"{record.where}: the label must be {wanted}, got {label!r}{hint}")
    labels = label if several else [label]
    for one in labels:
        fraction = isinstance(one, float) and not one.is_integer()
        if fraction or one is None or isinstance(one, (dict, list)):
            raise UserError(f"{record.where}: the label must be a name or a number, got {one!r}")
    return labels


def id_of(label: Any, ids: dict[str, int], names: list[str], record: LabelledRecord) -> int:
    """Return the id of a label.

    Raises:
        UserError: there is no such label.
    """
    text = text_of(label)
    if text not in ids:
        text = _WHOLE.sub(r"\1", text)
    if text not in ids:
        known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise UserError(f"{record.where}: label {label!r} is none of {known}; correct it or set task.labels")
    return ids[text]


def are_vectors(records: list[LabelledRecord], problem_type: str, names: int | None, fields: LabelledFields) -> bool:
    """Return whether each label is a list with a flag of 0 or 1 for every label, not a list of the labels that apply.

    That is so if all lists have the same length, at least two, and hold nothing but 0 and 1. Read as ids, such lists
    would say the same of every text.

    Args:
        names: number of the labels, if it is known; a list of flags has as many.
    """
    if problem_type != "multi_label_classification" or not isinstance(fields.label_field, str):
        return False
    lengths = set()
    for record in records:
        if not isinstance(record.label, list):
            return False
        lengths.add(len(record.label))
        if any(isinstance(value, str) or value not in (0, 1) for value in record.label):
            return False
    if len(lengths) != 1:
        return False
    (length,) = lengths
    return length == names if names is not None else length > 1


def numbers(record: LabelledRecord) -> list[float]:
    """Return the numbers to regress on.

    Raises:
        UserError: something else, or no finite number.
    """
    values = record.label if isinstance(record.label, list) else [record.label]
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not np.isfinite(numbers).all():
        raise UserError(f"{record.where}: the label must be a number or numbers, got {record.label!r}")
    return numbers


def flags(record: LabelledRecord) -> list[float]:
    """Return 0 or 1 for each label; JSON has numbers and booleans, csv has strings.

    Raises:
        UserError: another value.
    """
    flags = [text_of(value).lower() for value in record.label]
    flags = [_WHOLE.sub(r"\1", flag) for flag in flags]
    if not set(flags) <= {"0", "1", "true", "false"}:
        raise UserError(f"{record.where}: the fields of several labels must hold 0 or 1, got {record.label}")
    return [float(flag in ("1", "true")) for flag in flags]
