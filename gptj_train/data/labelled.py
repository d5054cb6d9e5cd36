"""Labelled texts in memory: token ids, and labels as the model wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptj_train.data.labelled_files import LabelledFields, Record, read_records
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.schema import schema

_TEXTS_AT_ONCE = 1024


@schema
class LabelledDataConfig(LabelledFields):
    """Where the labelled texts are. Paths may be files, folders or globs, one or a list."""

    train: str | list[str]
    validation: str | list[str] | None


@dataclass(frozen=True)
class LabelledRows:
    """token_ids: of each row, 1 to sequence_length of them; labels: (R) int64 class ids, or (R, L) float32."""

    token_ids: list[np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)


def prepare_labelled(
    data: LabelledDataConfig, problem_type: str, labels: Sequence[str] | None, tokenizer: Tokenizer, length: int
) -> tuple[LabelledRows, LabelledRows | None, list[str]]:
    """Training and held-out rows, and the names of the labels in the order of their ids.

    Args:
        problem_type: as in a Transformers config.
        labels: the names; None takes those of the training data, sorted.
        length: most tokens of a row.

    Raises:
        UserError: no files, or a record without text or without a label that can be used (file and row).
    """
    if len(data.label_fields) > 1 and problem_type == "single_label_classification":
        raise UserError("data.label_field: several fields are for multi_label_classification and regression")
    records = list(read_records(data.train, "data.train", data))
    held_out = list(read_records(data.validation, "data.validation", data)) if data.validation else []
    if problem_type == "regression":
        width = len(_numbers(records[0]))
        names = [str(name) for name in labels or _names_of_numbers(data, width)]
        if len(names) != width:
            raise UserError(f"task.labels has {len(names)} names, but {records[0].where} has {width} numbers")
    else:
        names = [str(name) for name in labels] if labels else _names_in(records, problem_type, data)
        if len(set(names)) < max(len(names), 1 if problem_type.startswith("multi") else 2):
            raise UserError(f"the labels are {names}; two or more different ones are needed: check data.label_field")
    train, validation = (
        LabelledRows(_token_ids(part, tokenizer, length), _targets(part, problem_type, names, data)) if part else None
        for part in (records, held_out)
    )
    assert train is not None
    return train, validation, names


def labelled_rows(
    paths: str | list[str],
    fields: LabelledFields,
    problem_type: str,
    names: list[str],
    tokenizer: Tokenizer,
    length: int,
) -> LabelledRows:
    """The rows of ``data.validation``, for a model that knows its labels.

    Raises:
        UserError: as ``prepare_labelled``; also for a label that is none of ``names``.
    """
    records = list(read_records(paths, "data.validation", fields))
    return LabelledRows(_token_ids(records, tokenizer, length), _targets(records, problem_type, names, fields))


# --- labels ---


def _names_in(records: list[Record], problem_type: str, data: LabelledFields) -> list[str]:
    if not isinstance(data.label_field, str):
        return data.label_field
    names = {str(label) for record in records for label in _given(record, problem_type)}
    return sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))


def _given(record: Record, problem_type: str) -> list[Any]:
    """The labels of a record as they stand there."""
    several = problem_type == "multi_label_classification"
    if isinstance(record.label, list) != several or isinstance(record.label, (float, dict)):
        wanted = "a list of labels" if several else "a name or a number"
        hint = "; in a csv give a column of 0 and 1 for each label, data.label_field=[a,b,c]" if several else ""
        raise UserError(f"{record.where}: the label must be {wanted}, got {record.label!r}{hint}")
    return record.label if several else [record.label]


def _targets(records: list[Record], problem_type: str, names: list[str], data: LabelledFields) -> np.ndarray:
    """(R) int64 class ids, or (R, L) float32: 0 and 1 for several labels, numbers to regress on."""
    if problem_type == "regression":
        numbers = [_numbers(record) for record in records]
        for record, own in zip(records, numbers, strict=True):
            if len(own) != len(names):
                raise UserError(f"{record.where}: {len(own)} numbers, but {len(names)} in the first row")
        return np.array(numbers, dtype=np.float32)
    if not isinstance(data.label_field, str):
        return np.array([_flags(record) for record in records], dtype=np.float32)
    ids = {name: label for label, name in enumerate(names)}
    if not any(name.isdigit() for name in names):  # then a number can only be an id
        ids |= {str(label): label for label in range(len(names))}
    chosen = [[_id_of(label, ids, names, record) for label in _given(record, problem_type)] for record in records]
    if problem_type == "single_label_classification":
        return np.array(chosen, dtype=np.int64)[:, 0]
    flags = np.zeros((len(records), len(names)), dtype=np.float32)
    for record, row_flags, labels in zip(records, flags, chosen, strict=True):
        if len(set(labels)) < len(labels):
            raise UserError(f"{record.where}: a label twice in {record.label}; list each label that applies once")
        row_flags[labels] = 1
    return flags


def _id_of(label: Any, ids: dict[str, int], names: list[str], record: Record) -> int:
    try:
        return ids[str(label)]
    except KeyError:
        known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise UserError(f"{record.where}: label {label!r} is none of {known}; correct it or set task.labels") from None


def _numbers(record: Record) -> list[float]:
    try:
        numbers = [float(value) for value in (record.label if isinstance(record.label, list) else [record.label])]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not np.isfinite(numbers).all():
        raise UserError(f"{record.where}: the label must be a number or numbers, got {record.label!r}")
    return numbers


def _names_of_numbers(data: LabelledFields, width: int) -> list[str]:
    fields = data.label_fields
    return fields if len(fields) == width else [f"{fields[0]}_{number}" for number in range(width)]


def _flags(record: Record) -> list[float]:
    flags = [str(value).lower() for value in record.label]
    if not set(flags) <= {"0", "1", "true", "false"}:
        raise UserError(f"{record.where}: the fields of several labels must hold 0 or 1, got {record.label}")
    return [float(flag in ("1", "true")) for flag in flags]


# --- texts ---


def _token_ids(records: list[Record], tokenizer: Tokenizer, length: int) -> list[np.ndarray]:
    rows = []
    for start in range(0, len(records), _TEXTS_AT_ONCE):
        texts = [record.texts for record in records[start : start + _TEXTS_AT_ONCE]]
        encoded = [iter(tokenizer.encode_documents(list(column))) for column in zip(*texts, strict=True)]
        rows += [np.array(joined([next(ids) for ids in encoded], length), dtype=np.int32) for _ in texts]
    return rows


def joined(documents: list[list[int]], length: int) -> list[int]:
    """A text or a pair, each ended by the end-of-text id, as one row of at most ``length`` tokens.

    The end-of-text id stays between the two and goes at the end. A pair that is too long loses
    the end of its longer text first.
    """
    if len(documents) == 1:
        return documents[0][:-1][:length]
    (*first, separator), (*second, _) = documents
    room = max(length - 1, 0)
    of_second = min(len(second), max(room // 2, room - len(first)))
    return [*first[: room - of_second], separator, *second[:of_second]]
