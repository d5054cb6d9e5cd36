"""Labelled texts from files and saved ``datasets`` folders."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptj_train.data.bad_records import check_share
from gptj_train.data.files import RECORD_SUFFIXES, find_files
from gptj_train.data.formats import say_unread
from gptj_train.data.parsing import BadRecordError, parse_record, value_of, with_outermost
from gptj_train.data.record_files import first_records, read_records
from gptj_train.data.records import checked_text
from gptj_train.errors import UserError
from gptj_train.schema import schema


@schema
class LabelledFields:
    """Which fields of a record hold its text or pair of texts, and its label or labels."""

    text_field: str
    second_text_field: str | None
    label_field: str | list[str]
    bad_records: Literal["error", "skip"]
    max_bad_share: float

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
        where: file and line or row, for messages.
        texts: one text or two.
        label: as in the file; a list if ``label_field`` is one.
    """

    where: str
    texts: list[str]
    label: Any


def read_labelled(paths: str | list[str], key: str, fields: LabelledFields) -> list[LabelledRecord]:
    """Read the rows of all files and saved datasets that a config key names, in a fixed order.

    Raises:
        UserError: no file, a file that cannot be read, a row without text or label, named, or too many of those.
    """
    files = find_files(paths, key, RECORD_SUFFIXES)
    columns = with_outermost([*fields.text_fields, *fields.label_fields])
    records: list[LabelledRecord] = []
    skipped = Counter[str]()
    for file in files:
        for row in read_records(file, columns, lambda read: None):
            try:
                records.append(_record(parse_record(row["record"]), row["where"], fields))
            except BadRecordError as error:
                if fields.bad_records == "error":
                    raise UserError(f"{row['where']}: {error}") from None
                skipped[error.reason] += 1
    check_share(key, skipped, len(records), fields.max_bad_share)
    if not records:
        raise UserError(f"{key}: no rows in {paths}; give files with at least one")
    say_unread(_first_of(files), columns, key)
    return records


def _first_of(files: list[Path]) -> list[dict[str, Any]]:
    for file in files:
        records = first_records(file)
        if records:
            return records
    return []


def _record(row: dict[str, Any], where: str, fields: LabelledFields) -> LabelledRecord:
    """Return the texts and the label of a row.

    Raises:
        BadRecordError: one of them is missing.
    """
    filled = ", ".join(name for name, value in row.items() if not _is_missing(value))
    texts = []
    for field in fields.text_fields:
        text = value_of(row, field)
        # The second text of a pair may be empty, such as a title: what is missing is null or has no field.
        may_be_empty = field != fields.text_field
        if not isinstance(text, str) or not (text or may_be_empty):
            key = "data.text_field" if field == fields.text_field else "data.second_text_field"
            advice = f"the fields with a value are {filled}; set {key} or fix it"
            raise BadRecordError(f"no text in {field!r}", advice)
        texts.append(checked_text(text))
    labels = [value_of(row, field) for field in fields.label_fields]
    if any(_is_missing(label) for label in labels):
        advice = f"the fields with a value are {filled}; set data.label_field or fix it"
        raise BadRecordError(f"no {fields.label_field!r}", advice)
    return LabelledRecord(where, texts, labels[0] if isinstance(fields.label_field, str) else labels)


def _is_missing(value: Any) -> bool:
    # pandas writes a missing number as NaN.
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))
