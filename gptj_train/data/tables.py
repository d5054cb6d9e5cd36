"""Rows of .parquet and .arrow files, in batches: memory does not grow with the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptj_train.data.parsing import BadRecordError
from gptj_train.errors import UserError
from gptj_train.failed_download import failed_download

_ROWS = 1000  # read at once
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # end-of-stream marker of the Arrow IPC streaming format
_FILE_START = b"ARROW1"  # magic of the Arrow IPC file format, which has an index at its end


def read_rows(
    file: Path, columns: set[str], progress: Callable[[int], None]
) -> Iterator[dict[str, Any] | BadRecordError]:
    """Read the rows of a table as dictionaries; an error takes the place of a row that Python cannot represent.

    Args:
        columns: the columns to read; a table that has none of them is read in whole.
        progress: called with the number of bytes of the file read since the last call.

    Raises:
        UserError: a damaged file.
    """
    import pyarrow as pa

    size = file.stat().st_size
    reported = 0
    try:
        with pa.memory_map(str(file)) as source:
            for share, batch in _batches(source, file.suffix.lower()):
                wanted = [name for name in batch.schema.names if name in columns]
                twice = next((name for name in wanted if wanted.count(name) > 1), None)
                if twice is not None:
                    raise ValueError(f"it has the column {twice!r} twice")
                labels = _class_labels(batch.schema)
                for row in _dictionaries(batch.select(wanted) if wanted else batch):
                    if isinstance(row, dict):
                        for name in labels.keys() & row.keys():
                            row[name] = _label_name(labels[name], row[name])
                    yield row
                progress(int(size * share) - reported)
                reported = int(size * share)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        instead = failed_download(file)
        if instead is not None:
            raise UserError(f"{file}: this is {instead}") from None
        lines = str(error).splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"{file}: cannot be read as {file.suffix[1:]} ({reason}); write it again") from None
    progress(size - reported)


def first_rows(file: Path, count: int) -> list[dict[str, Any]]:
    """Return the first rows of a table with all columns that Python can represent; none of a damaged file."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    try:
        with pa.memory_map(str(file)) as source:
            for _, batch in _batches(source, file.suffix.lower()):
                head = batch.slice(0, count)
                rows = [{} for _ in range(head.num_rows)]
                for name in head.schema.names:
                    try:
                        values = head.column(name).to_pylist()
                    except (ValueError, OverflowError, KeyError):  # KeyError: a name that two columns have
                        continue
                    for row, value in zip(rows, values, strict=True):
                        row[name] = value
                if rows:
                    break
    except (pa.ArrowException, OSError, ValueError):
        return []
    return rows


def _class_labels(schema: Any) -> dict[str, list[str]]:
    """Return the columns for which ``datasets`` keeps names beside integers: column -> its label names."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    found = {}
    for column, feature in features.items():
        if isinstance(feature, list) and feature:
            feature = feature[0]
        if isinstance(feature, dict):
            # A list of class labels describes its elements under "feature".
            inner = feature.get("feature", feature)
            if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and inner.get("names"):
                found[column] = inner["names"]
    return found


def _label_name(names: list[str], label: Any) -> Any:
    """Return the name, or list of names, of an integer label; None if there is no label, which is -1 in datasets."""
    if isinstance(label, list):
        return [_label_name(names, item) for item in label]
    return names[label] if isinstance(label, int) and 0 <= label < len(names) else None


def _batches(source: Any, suffix: str) -> Iterator[tuple[float, Any]]:
    """Yield each record batch, and the share of the file that has been read with it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if suffix == ".parquet":
        table = pq.ParquetFile(source)
        rows = 0
        for batch in table.iter_batches(batch_size=_ROWS):
            rows += batch.num_rows
            yield rows / table.metadata.num_rows, batch
    elif source.read(len(_FILE_START)) == _FILE_START:
        table = pa.ipc.open_file(source)
        for number in range(table.num_record_batches):
            yield (number + 1) / table.num_record_batches, table.get_batch(number)
    else:
        # A reader takes the end of the file for the end of the stream, and would not notice that batches are missing.
        end = source.read_at(len(_STREAM_END), max(0, source.size() - len(_STREAM_END)))
        if end != _STREAM_END:
            raise pa.ArrowInvalid("no end-of-stream marker: the file is cut off")
        source.seek(0)
        for batch in pa.ipc.open_stream(source):
            yield source.tell() / source.size(), batch


def _dictionaries(batch: Any) -> Iterator[dict[str, Any] | BadRecordError]:
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        # Some value has no Python equivalent: invalid UTF-8, or a date beyond the year 9999. Find its row.
        for number in range(batch.num_rows):
            try:
                (row,) = batch.slice(number, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                row = BadRecordError("a value that cannot be read", f"correct it ({error})")
            yield row
    else:
        yield from rows
