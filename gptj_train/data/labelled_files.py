"""Labelled texts out of jsonl, csv, parquet and ``datasets`` folders."""

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
        return [self.text_field, *([self.second_text_field] if self.second_text_field else [])]

    @property
    def label_fields(self) -> list[str]:
        return [self.label_field] if isinstance(self.label_field, str) else self.label_field


@dataclass(frozen=True)
class Record:
    """A row as it stands in its file; ``where`` names it in messages."""

    where: str
    texts: list[str]
    label: Any


def read_records(paths: str | list[str], key: str, data: LabelledFields) -> Iterator[Record]:
    """The rows of all files that the config key names, in a fixed order.

    Raises:
        UserError: no file, a file that cannot be read, or a row without text or label, named.
    """
    empty = True
    for source in _sources(paths, key):
        for number, row in enumerate(_rows(source, data), start=1):
            empty = False
            yield _record(row, f"{source} row {number}", data)
    if empty:
        raise UserError(f"{key}: no rows in {paths}; give files with at least one")


def _sources(paths: str | list[str], key: str) -> list[Path]:
    """Files, and folders that ``Dataset.save_to_disk`` wrote, in a fixed order."""
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str) else paths:
        matches = [Path(match) for match in sorted(glob.glob(path, recursive=True))]
        sources = [source for match in matches for source in _sources_at(match)]
        if not sources:
            raise UserError(
                f"{key}: no .jsonl, .csv or .parquet file and no saved dataset at {path!r} (looked from {Path.cwd()}); "
                "correct the path"
            )
        found += sources
    return found


def _sources_at(path: Path) -> list[Path]:
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(str(state.parent) for state in path.glob("*/state.json")))
        raise UserError(f"{path}: holds several splits; name one of them: {splits}")
    if (path / "state.json").is_file():
        return [path]
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in files if file.suffix in _READERS]


def _rows(source: Path, data: LabelledFields) -> Iterator[dict[str, Any]]:
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
        raise UserError(f"{source}: cannot be read ({reason}); correct the file") from None


def _opened(source: Path, data: LabelledFields) -> Dataset | IterableDataset:
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


def _record(row: dict[str, Any], where: str, data: LabelledFields) -> Record:
    texts = [row.get(field) for field in data.text_fields]
    for field, text in zip(data.text_fields, texts, strict=True):
        if not isinstance(text, str) or not text:
            raise UserError(f"{where}: no text in {field!r}, filled are {_filled(row)}; set data.text_field or fix it")
    label = [row.get(field) for field in data.label_fields]
    if None in label or "" in label:
        raise UserError(f"{where}: no {data.label_field!r}, filled are {_filled(row)}; set data.label_field or fix it")
    return Record(where, texts, label[0] if isinstance(data.label_field, str) else label)  # type: ignore[arg-type]


def _filled(row: dict[str, Any]) -> str:
    return ", ".join(name for name, value in row.items() if value not in (None, ""))
