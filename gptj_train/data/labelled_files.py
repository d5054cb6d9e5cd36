"""Labelled texts from jsonl, csv, parquet and saved ``datasets`` folders."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, IterableDataset, disable_progress_bars, load_dataset
from datasets import Sequence as ListOf

from gptj_train.errors import UserError
from gptj_train.schema import schema

disable_progress_bars()

_READERS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@schema
class LabelledFields:
    """Which fields of a record hold its text or pair of texts, and its label or labels."""

    text_field: str
    second_text_field: str | None
    label_field: str | list[str]

    @property
    def text_fields(self) -> list[str]:
        if self.second_text_field:
            return [self.text_field, self.second_text_field]
        return [self.text_field]

    @property
    def label_fields(self) -> list[str]:
        return [self.label_field] if isinstance(self.label_field, str) else self.label_field


@dataclass(frozen=True)
class LabelledRecord:
    """A row of a file.

    Attributes:
        where: file and row, for messages.
        texts: one text or two.
        label: as in the file; a list if ``label_field`` is one.
    """

    where: str
    texts: list[str]
    label: Any


def read_records(paths: str | list[str], key: str, fields: LabelledFields) -> Iterator[LabelledRecord]:
    """Read the rows of all files and saved datasets that a config key names, in a fixed order.

    Raises:
        UserError: no file, a file that cannot be read, or a row without text or label, named.
    """
    empty = True
    for source in _find_sources(paths, key):
        for number, row in enumerate(_rows(source, fields), start=1):
            empty = False
            yield _record(row, f"{source} row {number}", fields)
    if empty:
        raise UserError(f"{key}: no rows in {paths}; give files with at least one")


def _find_sources(paths: str | list[str], key: str) -> list[Path]:
    """Find files, and the folders that ``Dataset.save_to_disk`` wrote."""
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str) else paths:
        sources: list[Path] = []
        for match in sorted(glob.glob(path, recursive=True)):
            sources += _sources_at(Path(match))
        if not sources:
            raise UserError(
                f"{key}: no .jsonl, .csv or .parquet file and no saved dataset at {path!r} "
                f"(working directory: {Path.cwd()}); correct the path"
            )
        found += sources
    return found


def _sources_at(path: Path) -> list[Path]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(str(state.parent) for state in path.glob("*/state.json"))
        raise UserError(f"{path}: contains several splits; name one of them: {', '.join(splits)}")
    if (path / "state.json").is_file():
        return [path]  # a saved dataset
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in files if file.suffix in _READERS]


def _rows(source: Path, fields: LabelledFields) -> Iterator[dict[str, Any]]:
    """Read rows, with the names of class labels in place of their integers."""
    if source.is_file() and source.stat().st_size == 0:
        return  # the json reader fails on an empty file
    try:
        dataset = _open(source, fields)
        class_labels = _class_labels(dataset, fields)
        for row in dataset:
            for field, names in class_labels.items():
                row[field] = _label_names(names, row[field])
            yield row
    except Exception as error:  # each reader has its own exceptions
        lines = str(error.__cause__ or error).splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"{source}: cannot be read ({reason}); correct the file") from None


def _open(source: Path, fields: LabelledFields) -> Dataset | IterableDataset:
    if source.is_dir():
        return Dataset.load_from_disk(str(source))
    options: dict[str, Any] = {}
    if source.suffix == ".csv":
        # Every value stays a string: pandas would read a text "12" as a number, and "None" or "NA" as missing.
        options = {"converters": dict.fromkeys((*fields.text_fields, *fields.label_fields), str), "na_filter": False}
    # Escaped, because the name of the file may look like a glob; streaming, because otherwise it would be copied into
    # the cache of datasets first.
    name = glob.escape(str(source))
    return load_dataset(_READERS[source.suffix], data_files=name, split="train", streaming=True, **options)


def _class_labels(dataset: Dataset | IterableDataset, fields: LabelledFields) -> dict[str, ClassLabel]:
    """Return the label fields for which a saved dataset keeps names beside its integers."""
    features = dataset.features or {}
    class_labels = {}
    for field in fields.label_fields:
        feature = features.get(field)
        if isinstance(feature, ListOf):
            feature = feature.feature
        if isinstance(feature, ClassLabel):
            class_labels[field] = feature
    return class_labels


def _label_names(names: ClassLabel, label: Any) -> Any:
    """Return the name, or list of names, of an integer label; None if there is no label, which is -1 in datasets."""
    if isinstance(label, list):
        return [_label_names(names, item) for item in label]
    if label is None or not 0 <= label < names.num_classes:
        return None
    return names.int2str(label)


def _record(row: dict[str, Any], where: str, fields: LabelledFields) -> LabelledRecord:
    filled = ", ".join(name for name, value in row.items() if value not in (None, ""))
    texts = []
    for field in fields.text_fields:
        text = row.get(field)
        if not isinstance(text, str) or not text:
            raise UserError(
                f"{where}: no text in {field!r}, the fields with a value are {filled}; set data.text_field or fix it"
            )
        texts.append(text)
    labels = [row.get(field) for field in fields.label_fields]
    if None in labels or "" in labels:
        raise UserError(
            f"{where}: no {fields.label_field!r}, the fields with a value are {filled}; set data.label_field or fix it"
        )
    return LabelledRecord(where, texts, labels[0] if isinstance(fields.label_field, str) else labels)
