"""Labelled texts in memory: token ids, and labels in the form that the model's loss takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptj_train.data.labelled_files import LabelledFields, LabelledRecord, read_records
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.schema import schema

_TEXTS_AT_ONCE = 1024  # tokenized by all cores together


@schema
class LabelledDataConfig(LabelledFields):
    """Labelled texts to train on and to hold out. Paths may be files, folders or globs, one or a list."""

    train: str | list[str]
    validation: str | list[str] | None


@dataclass(frozen=True)
class LabelledRows:
    """Tokenized texts and their labels.

    Attributes:
        token_ids: (T_i) int32 of each of R rows, with 1 <= T_i <= sequence_length.
        labels: (R) int64 class ids; or (R, L) float32: 0 and 1 for several labels, or numbers to regress on.
    """

    token_ids: list[np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)


def prepare_labelled(
    data: LabelledDataConfig,
    *,
    problem_type: str,
    labels: Sequence[str] | None,
    tokenizer: Tokenizer,
    length: int,
) -> tuple[LabelledRows, LabelledRows | None, list[str]]:
    """Return training rows, held-out rows, and the names of the labels in the order of their ids.

    Args:
        problem_type: as in a Transformers config.
        labels: names of the labels; None: those in the training data, sorted.
        length: tokens of a row at most; longer texts are truncated.

    Raises:
        UserError: no files, or a record without text or a usable label, named by file and row.
    """
    if len(data.label_fields) > 1 and problem_type == "single_label_classification":
        raise UserError("data.label_field: several fields are for multi_label_classification and regression")
    train = list(read_records(data.train, "data.train", data))
    validation = list(read_records(data.validation, "data.validation", data)) if data.validation else []
    if problem_type == "regression":
        names = _regression_names(train[0], labels, data)
    else:
        names = _label_names(train, labels, problem_type, data)
    targets = _targets(train, problem_type, names, data)
    validation_targets = _targets(validation, problem_type, names, data) if validation else None
    # Labels first: a wrong one should not show up only after all texts are tokenized.
    train_rows = LabelledRows(_token_ids(train, tokenizer, length), targets)
    if validation_targets is None:
        return train_rows, None, names
    return train_rows, LabelledRows(_token_ids(validation, tokenizer, length), validation_targets), names


def labelled_rows(
    paths: str | list[str],
    fields: LabelledFields,
    *,
    problem_type: str,
    names: list[str],
    tokenizer: Tokenizer,
    length: int,
) -> LabelledRows:
    """Return the rows of ``data.validation`` for a model with known labels.

    Raises:
        UserError: as ``prepare_labelled``; also a label that is none of ``names``.
    """
    records = list(read_records(paths, "data.validation", fields))
    targets = _targets(records, problem_type, names, fields)
    return LabelledRows(_token_ids(records, tokenizer, length), targets)


# --- names of labels ---


def _regression_names(first: LabelledRecord, labels: Sequence[str] | None, fields: LabelledFields) -> list[str]:
    width = len(_numbers(first))
    if labels:
        names = [str(name) for name in labels]
    elif len(fields.label_fields) == width:
        names = fields.label_fields
    else:
        # A single field with a list of numbers.
        names = [f"{fields.label_fields[0]}_{number}" for number in range(width)]
    if len(names) != width:
        raise UserError(f"task.labels has {len(names)} names, but {first.where} has {width} numbers")
    return names


def _label_names(
    records: list[LabelledRecord], labels: Sequence[str] | None, problem_type: str, fields: LabelledFields
) -> list[str]:
    if labels:
        names = [str(name) for name in labels]
    elif isinstance(fields.label_field, str):
        names = _names_in(records, problem_type)
    else:
        names = fields.label_field
    fewest = 1 if problem_type.startswith("multi") else 2
    if len(set(names)) < max(len(names), fewest):
        raise UserError(f"the labels are {names}; two or more different ones are needed: check data.label_field")
    return names


def _names_in(records: list[LabelledRecord], problem_type: str) -> list[str]:
    """Return the labels that occur: numbers first, in numerical order, then names in alphabetical order."""
    names = set()
    for record in records:
        names |= {str(label) for label in _listed_labels(record, problem_type)}
    numbers = sorted((name for name in names if name.isdecimal()), key=lambda name: (int(name), name))
    return numbers + sorted(name for name in names if not name.isdecimal())


# --- labels as arrays ---


def _targets(records: list[LabelledRecord], problem_type: str, names: list[str], fields: LabelledFields) -> np.ndarray:
    """Return the labels as ``LabelledRows.labels``."""
    if problem_type == "regression":
        return _regression_targets(records, names)
    if not isinstance(fields.label_field, str):
        return np.array([_flags(record) for record in records], dtype=np.float32)
    ids = {name: label for label, name in enumerate(names)}
    if not any(name.isdecimal() for name in names):
        # Then a number cannot be a name, and is taken for an id.
        ids |= {str(label): label for label in range(len(names))}
    chosen = []
    for record in records:
        labels = _listed_labels(record, problem_type)
        chosen.append([_id_of(label, ids, names, record) for label in labels])
    if problem_type == "single_label_classification":
        return np.array(chosen, dtype=np.int64)[:, 0]
    flags = np.zeros((len(records), len(names)), dtype=np.float32)
    for row, (record, label_ids) in enumerate(zip(records, chosen, strict=True)):
        # As likely as a slip it is a row of 0 and 1 for each label, which would set two labels everywhere.
        if len(set(label_ids)) < len(label_ids):
            raise UserError(f"{record.where}: a label twice in {record.label}; list each label that applies once")
        flags[row, label_ids] = 1
    return flags


def _regression_targets(records: list[LabelledRecord], names: list[str]) -> np.ndarray:
    rows = []
    for record in records:
        numbers = _numbers(record)
        if len(numbers) != len(names):
            raise UserError(f"{record.where}: {len(numbers)} numbers, but {len(names)} in the first row")
        rows.append(numbers)
    return np.array(rows, dtype=np.float32)


def _listed_labels(record: LabelledRecord, problem_type: str) -> list[Any]:
    """Return the labels of a record as a list, as they are in the file."""
    several = problem_type == "multi_label_classification"
    if isinstance(record.label, list) != several or isinstance(record.label, (float, dict)):
        wanted = "a list of labels" if several else "a name or a number"
        hint = "; in a csv give a column of 0 and 1 for each label, data.label_field=[a,b,c]" if several else ""
        raise UserError(f"{record.where}: the label must be {wanted}, got {record.label!r}{hint}")
    return record.label if several else [record.label]


def _id_of(label: Any, ids: dict[str, int], names: list[str], record: LabelledRecord) -> int:
    if str(label) not in ids:
        known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise UserError(f"{record.where}: label {label!r} is none of {known}; correct it or set task.labels")
    return ids[str(label)]


def _numbers(record: LabelledRecord) -> list[float]:
    values = record.label if isinstance(record.label, list) else [record.label]
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not np.isfinite(numbers).all():
        raise UserError(f"{record.where}: the label must be a number or numbers, got {record.label!r}")
    return numbers


def _flags(record: LabelledRecord) -> list[float]:
    """Return 0 or 1 for each label field; JSON has numbers and booleans, csv has strings."""
    flags = [str(value).lower() for value in record.label]
    if not set(flags) <= {"0", "1", "true", "false"}:
        raise UserError(f"{record.where}: the fields of several labels must hold 0 or 1, got {record.label}")
    return [float(flag in ("1", "true")) for flag in flags]


# --- texts ---


def _token_ids(records: list[LabelledRecord], tokenizer: Tokenizer, length: int) -> list[np.ndarray]:
    rows = []
    for start in range(0, len(records), _TEXTS_AT_ONCE):
        batch = records[start : start + _TEXTS_AT_ONCE]
        # All first texts, then all second ones: tokenizing many at once uses all cores.
        columns = zip(*[record.texts for record in batch], strict=True)
        encoded = [tokenizer.encode_texts(list(column)) for column in columns]
        for texts in zip(*encoded, strict=True):
            ids = texts[0][:length] if len(texts) == 1 else join_pair(*texts, separator=tokenizer.eos_id, length=length)
            rows.append(np.array(ids, dtype=np.int32))
    return rows


def join_pair(first: list[int], second: list[int], *, separator: int, length: int) -> list[int]:
    """Join two texts with a token between them, into at most ``length`` tokens.

    A pair that is too long is truncated at the end of its longer text first.
    """
    room = max(length - 1, 0)
    half = room // 2
    # The second text gets what the first one leaves, and at least half.
    of_second = min(len(second), max(half, room - len(first)))
    of_first = room - of_second
    return [*first[:of_first], separator, *second[:of_second]]
