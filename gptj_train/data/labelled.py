"""Labelled texts in memory: token ids, and labels in the form that the model's loss takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptj_train.counted import counted
from gptj_train.data import label_values
from gptj_train.data.formats import say
from gptj_train.data.held_out_share import HeldOutShare
from gptj_train.data.labelled_files import LabelledFields, LabelledRecord, read_labelled
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.launch.datasets_by_name import DatasetKeys
from gptj_train.schema import schema

_TEXTS_AT_ONCE = 1024  # tokenized by all cores together


@schema
class LabelledDataConfig(LabelledFields, DatasetKeys):
    """Labelled texts to train on and to hold out. Paths may be files, folders or globs, one or a list."""

    train: str | list[str]
    validation: str | list[str] | None


@dataclass(frozen=True)
class LabelledRows:
    """Tokenized texts and their labels.

    Attributes:
        token_ids: (T_i) int32 of each of R rows, with 1 <= T_i <= sequence_length.
        labels: (R) int64 class ids; or (R, L) float32: 0 and 1 for several labels, or numbers to regress on.
        truncated: rows whose text was longer than sequence_length.
    """

    token_ids: list[np.ndarray]
    labels: np.ndarray
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)


def prepare_labelled(
    data: LabelledDataConfig,
    *,
    problem_type: str,
    labels: Sequence[str] | None,
    tokenizer: Tokenizer,
    length: int,
    held_out: HeldOutShare,
) -> tuple[LabelledRows, LabelledRows | None, list[str]]:
    """Return training rows, held-out rows, and the names of the labels in the order of their ids.

    Args:
        problem_type: as in a Transformers config.
        labels: names of the labels; None: those in the training data, sorted.
        length: tokens of a row at most; longer texts are truncated.
        held_out: the part of the training data that is held out, where there are no validation files.

    Raises:
        UserError: no files, or a record without text or a usable label, named by file and row.
    """
    if len(data.label_fields) > 1 and problem_type == "single_label_classification":
        raise UserError("data.label_field: several fields are for multi_label_classification and regression")
    held_out.check(data.validation)
    train = read_labelled(data.train, "data.train", data)
    validation = read_labelled(data.validation, "data.validation", data) if data.validation else []
    vectors = label_values.are_vectors(train, problem_type, len(labels) if labels else None, data)
    if problem_type == "regression":
        names = label_values.regression_names(train[0], labels, data)
    elif vectors and not labels:
        names = [str(number) for number in range(len(train[0].label))]
    else:
        names = label_values.label_names(train, labels, problem_type, data)
    if vectors:
        say(f"data.train: {data.label_field!r} holds a flag of 0 or 1 for each of {counted(len(names), 'label')}")
    # Names and form of the labels are those of all records: a rare label may be held out whole.
    if not validation:
        train, validation = held_out.divide(train, lambda record: record.texts[0], "text")
    targets = _targets(train, problem_type, names, data, vectors=vectors)
    validation_targets = _targets(validation, problem_type, names, data, vectors=vectors) if validation else None
    # Labels first: a wrong one should not show up only after all texts are tokenized.
    train_rows = _rows_of(train, targets, tokenizer, length)
    if validation_targets is None:
        return train_rows, None, names
    return train_rows, _rows_of(validation, validation_targets, tokenizer, length), names


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
    records = read_labelled(paths, "data.validation", fields)
    vectors = label_values.are_vectors(records, problem_type, len(names), fields)
    targets = _targets(records, problem_type, names, fields, vectors=vectors)
    return _rows_of(records, targets, tokenizer, length)


# --- labels as arrays ---


def _targets(
    records: list[LabelledRecord], problem_type: str, names: list[str], fields: LabelledFields, *, vectors: bool
) -> np.ndarray:
    """Return the labels as ``LabelledRows.labels``.

    Args:
        vectors: the label is a list with a flag for each name.
    """
    if problem_type == "regression":
        return _regression_targets(records, names)
    if vectors:
        return np.array([_vector(record, names) for record in records], dtype=np.float32)
    if not isinstance(fields.label_field, str):
        return np.array([label_values.flags(record) for record in records], dtype=np.float32)
    ids = {name: label for label, name in enumerate(names)}
    if not any(name.isdecimal() for name in names):
        # Then a number cannot be a name, and is taken for an id.
        ids |= {str(label): label for label in range(len(names))}
    chosen = []
    for record in records:
        labels = label_values.listed_labels(record, problem_type)
        chosen.append([label_values.id_of(label, ids, names, record) for label in labels])
    if problem_type == "single_label_classification":
        return np.array(chosen, dtype=np.int64)[:, 0]
    flags = np.zeros((len(records), len(names)), dtype=np.float32)
    for row, (record, label_ids) in enumerate(zip(records, chosen, strict=True)):
        # As likely as a slip it is a flag for each of other labels than these, which would set two labels everywhere.
        if len(set(label_ids)) < len(label_ids):
            raise UserError(f"{record.where}: a label twice in {record.label}; list each label that applies once")
        flags[row, label_ids] = 1
    return flags


def _vector(record: LabelledRecord, names: list[str]) -> list[float]:
    if not isinstance(record.label, list) or len(record.label) != len(names):
        raise UserError(
            f"{record.where}: a list of {counted(len(names), 'flag')} of 0 and 1 is wanted, got {record.label!r}"
        )
    return label_values.flags(record)


def _regression_targets(records: list[LabelledRecord], names: list[str]) -> np.ndarray:
    rows = []
    for record in records:
        numbers = label_values.numbers(record)
        if len(numbers) != len(names):
            raise UserError(f"{record.where}: {counted(len(numbers), 'number')}, but {len(names)} in the first row")
        rows.append(numbers)
    return np.array(rows, dtype=np.float32)


# --- texts ---


def _rows_of(records: list[LabelledRecord], labels: np.ndarray, tokenizer: Tokenizer, length: int) -> LabelledRows:
    rows = []
    truncated = 0
    for start in range(0, len(records), _TEXTS_AT_ONCE):
        batch = records[start : start + _TEXTS_AT_ONCE]
        # All first texts, then all second ones: tokenizing many at once uses all cores.
        columns = zip(*[record.texts for record in batch], strict=True)
        encoded = [tokenizer.encode_texts(list(column)) for column in columns]
        for texts in zip(*encoded, strict=True):
            ids = texts[0][:length] if len(texts) == 1 else join_pair(*texts, separator=tokenizer.eos_id, length=length)
            rows.append(np.array(ids, dtype=np.int32))
            # A pair has a separator between its texts.
            truncated += sum(len(text) for text in texts) + len(texts) - 1 > length
    return LabelledRows(rows, labels, truncated)


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
