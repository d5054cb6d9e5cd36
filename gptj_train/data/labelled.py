"""Labelled texts out of jsonl, csv, parquet and ``datasets`` folders: token ids and labels in memory."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, IterableDataset, disable_progress_bars, load_dataset
from datasets import Sequence as ListOf

from gptj_train.data.tokenizer import Tokenizer
from gptj_train.schema import schema

disable_progress_bars()

_READERS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_TEXTS_AT_ONCE = 1024


@schema
class LabelledDataConfig:
    """Where the labelled texts are. Paths may be files, folders or globs, one or a list."""

    train: str | list[str]
    validation: str | list[str] | None
    text_field: str
    second_text_field: str | None
    label_field: str | list[str]

    @property
    def text_fields(self) -> list[str]:
        return [self.text_field, *([self.second_text_field] if self.second_text_field else [])]

    @property
    def label_fields(self) -> list[str]:
        return [self.label_field] if isinstance(self.label_field, str) else self.label_field


@dataclass(frozen=True)
class LabelledRows:
    """token_ids: of each row, 1 to sequence_length of them; labels: (R) int64 class ids, or (R, L) float32."""

    token_ids: list[np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class _Record:
    where: str
    texts: list[str]
    label: Any


def prepare_labelled(
    data: LabelledDataConfig, problem_type: str, labels: Sequence[str] | None, tokenizer: Tokenizer, length: int
) -> tuple[LabelledRows, LabelledRows | None, list[str]]:
    """Training and held-out rows, and the names of the labels in the order of their ids.

    Args:
        problem_type: as in a Transformers config.
        labels: the names; None takes those of the training data, sorted.
        length: most tokens of a row.

    Raises:
        ValueError: no files, or a record without text or without a label that can be used (file and row).
    """
    if len(data.label_fields) > 1 and problem_type == "single_label_classification":
        raise ValueError("data.label_field: several fields are for multi_label_classification and regression")
    records = list(_records(data.train, "data.train", data))
    held_out = list(_records(data.validation, "data.validation", data)) if data.validation else []
    if problem_type == "regression":
        width = len(_numbers(records[0]))
        names = [str(name) for name in labels or _names_of_numbers(data, width)]
        if len(names) != width:
            raise ValueError(f"task.labels has {len(names)} names, but {records[0].where} has {width} numbers")
    else:
        names = [str(name) for name in labels] if labels else _names_in(records, problem_type, data)
        if len(set(names)) < max(len(names), 1 if problem_type.startswith("multi") else 2):
            raise ValueError(f"the labels are {names}; two or more different ones are needed: check data.label_field")
    train, validation = (
        LabelledRows(_token_ids(part, tokenizer, length), _targets(part, problem_type, names, data)) if part else None
        for part in (records, held_out)
    )
    assert train is not None
    return train, validation, names


# --- reading ---


def _records(paths: str | list[str], key: str, data: LabelledDataConfig) -> Iterator[_Record]:
    empty = True
    for source in _sources(paths, key):
        for number, row in enumerate(_rows(source, data), start=1):
            empty = False
            yield _record(row, f"{source} row {number}", data)
    if empty:
        raise ValueError(f"{key}: no rows in {paths}; give files with at least one")


def _sources(paths: str | list[str], key: str) -> list[Path]:
    """Files, and folders that ``Dataset.save_to_disk`` wrote, in a fixed order."""
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str) else paths:
        matches = [Path(match) for match in sorted(glob.glob(path, recursive=True))]
        sources = [source for match in matches for source in _sources_at(match)]
        if not sources:
            raise ValueError(
                f"{key}: no .jsonl, .csv or .parquet file and no saved dataset at {path!r} (looked from {Path.cwd()}); "
                "correct the path"
            )
        found += sources
    return found


def _sources_at(path: Path) -> list[Path]:
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(str(state.parent) for state in path.glob("*/state.json")))
        raise ValueError(f"{path}: holds several splits; name one of them: {splits}")
    if (path / "state.json").is_file():
        return [path]
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in files if file.suffix in _READERS]


def _rows(source: Path, data: LabelledDataConfig) -> Iterator[dict[str, Any]]:
    if source.is_file() and not source.stat().st_size:
        return  # the reader of json would stumble
    try:
        dataset = _opened(source, data)
        features = dataset.features or {}
        names = {field: found for field in data.label_fields if (found := _class_label(features.get(field)))}
        for row in dataset:
            named = {field: _int2str(known, row[field]) for field, known in names.items()}
            yield {**row, **named}
    except Exception as error:  # each reader raises its own
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source}: cannot be read ({reason}); correct the file") from None


def _opened(source: Path, data: LabelledDataConfig) -> Dataset | IterableDataset:
    if source.is_dir():
        return Dataset.load_from_disk(str(source))
    # A csv holds texts: no column is guessed to be numbers, and no "None" or "NA" to be nothing.
    texts = dict.fromkeys((*data.text_fields, *data.label_fields), str)
    options = {"converters": texts, "na_filter": False} if source.suffix == ".csv" else {}
    return load_dataset(
        _READERS[source.suffix], data_files=glob.escape(str(source)), split="train", streaming=True, **options
    )


def _class_label(feature: Any) -> ClassLabel | None:
    """The names that a dataset of ``datasets`` keeps beside its integers."""
    feature = feature.feature if isinstance(feature, ListOf) else feature
    return feature if isinstance(feature, ClassLabel) else None


def _int2str(names: ClassLabel, label: Any) -> Any:
    if isinstance(label, list):
        return [_int2str(names, item) for item in label]
    return names.int2str(label) if label is not None and 0 <= label < names.num_classes else None


def _record(row: dict[str, Any], where: str, data: LabelledDataConfig) -> _Record:
    texts = [row.get(field) for field in data.text_fields]
    for field, text in zip(data.text_fields, texts, strict=True):
        if not isinstance(text, str) or not text:
            raise ValueError(f"{where}: no text in {field!r}, filled are {_filled(row)}; set data.text_field or fix it")
    label = [row.get(field) for field in data.label_fields]
    if None in label or "" in label:
        raise ValueError(f"{where}: no {data.label_field!r}, filled are {_filled(row)}; set data.label_field or fix it")
    return _Record(where, texts, label[0] if isinstance(data.label_field, str) else label)  # type: ignore[arg-type]


def _filled(row: dict[str, Any]) -> str:
    return ", ".join(name for name, value in row.items() if value not in (None, ""))


# --- labels ---


def _names_in(records: list[_Record], problem_type: str, data: LabelledDataConfig) -> list[str]:
    if not isinstance(data.label_field, str):
        return data.label_field
    names = {str(label) for record in records for label in _given(record, problem_type)}
    return sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))


def _given(record: _Record, problem_type: str) -> list[Any]:
    """The labels of a record as they stand there."""
    several = problem_type == "multi_label_classification"
    if isinstance(record.label, list) != several or isinstance(record.label, (float, dict)):
        wanted = "a list of labels" if several else "a name or a number"
        hint = "; in a csv give a column of 0 and 1 for each label, data.label_field=[a,b,c]" if several else ""
        raise ValueError(f"{record.where}: the label must be {wanted}, got {record.label!r}{hint}")
    return record.label if several else [record.label]


def _targets(records: list[_Record], problem_type: str, names: list[str], data: LabelledDataConfig) -> np.ndarray:
    """(R) int64 class ids, or (R, L) float32: 0 and 1 for several labels, numbers to regress on."""
    if problem_type == "regression":
        numbers = [_numbers(record) for record in records]
        for record, own in zip(records, numbers, strict=True):
            if len(own) != len(names):
                raise ValueError(f"{record.where}: {len(own)} numbers, but {len(names)} in the first row")
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
            raise ValueError(f"{record.where}: a label twice in {record.label}; list each label that applies once")
        row_flags[labels] = 1
    return flags


def _id_of(label: Any, ids: dict[str, int], names: list[str], record: _Record) -> int:
    try:
        return ids[str(label)]
    except KeyError:
        known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise ValueError(f"{record.where}: label {label!r} is none of {known}; correct it or set task.labels") from None


def _numbers(record: _Record) -> list[float]:
    try:
        numbers = [float(value) for value in (record.label if isinstance(record.label, list) else [record.label])]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not np.isfinite(numbers).all():
        raise ValueError(f"{record.where}: the label must be a number or numbers, got {record.label!r}")
    return numbers


def _names_of_numbers(data: LabelledDataConfig, width: int) -> list[str]:
    fields = data.label_fields
    return fields if len(fields) == width else [f"{fields[0]}_{number}" for number in range(width)]


def _flags(record: _Record) -> list[float]:
    flags = [str(value).lower() for value in record.label]
    if not set(flags) <= {"0", "1", "true", "false"}:
        raise ValueError(f"{record.where}: the fields of several labels must hold 0 or 1, got {record.label}")
    return [float(flag in ("1", "true")) for flag in flags]


# --- texts ---


def _token_ids(records: list[_Record], tokenizer: Tokenizer, length: int) -> list[np.ndarray]:
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
