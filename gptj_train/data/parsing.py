"""A line of JSON, or an object from elsewhere -> the fields of a record."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


class BadRecordError(ValueError):
    """A record that cannot be used.

    Bad records are counted by reason, so a reason must not contain anything of the record itself. The advice may.
    """

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason = reason


def parse_record(record: Any) -> dict[str, Any]:
    """Return the fields of a record.

    Args:
        record: a line of JSON as bytes, an object that is parsed already, or the error that took its place.

    Raises:
        BadRecordError: that error, or no JSON, or no object.
    """
    if isinstance(record, BadRecordError):
        raise record
    if isinstance(record, bytes):
        record = _parsed(record)
    if not isinstance(record, dict):
        raise BadRecordError("not a record", "write a JSON object with a text in it")
    return record


def value_of(record: dict[str, Any], field: str) -> Any:
    """Return the value of a field, or of one inside another, such as "meta.pile_set_name"; None if it is not there."""
    if field in record:
        return record[field]
    value: Any = record
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def with_outermost(fields: Iterable[str]) -> set[str]:
    """Return these fields and, for those inside others, the names under which a table has them."""
    fields = set(fields)
    return fields | {field.partition(".")[0] for field in fields}


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of a JSON object.

    Raises:
        BadRecordError: a name twice. JSON's own reader would silently take the last.
    """
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRecordError("a field given twice", f"remove one of {twice[:100]!r}")
    return fields


_JSON = json.JSONDecoder(object_pairs_hook=unique_fields)


def _parsed(line: bytes) -> Any:
    """Parse a line of JSON.

    Raises:
        BadRecordError: no UTF-8, no JSON, or a field given twice.
    """
    try:
        return _JSON.decode(line.decode())
    except BadRecordError:
        raise
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start} of the line"
        raise BadRecordError("not UTF-8 text", f"convert it ({place})") from None
    except (ValueError, RecursionError) as error:  # ValueError: JSON's own, or an integer with too many digits
        raise BadRecordError("not a line of JSON", f"each line must be one record ({error})") from None
