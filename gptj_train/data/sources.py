"""Documents out of files: Pile-style jsonl and plain text, through ``datasets``."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import IterableDataset, disable_progress_bars

from gptj_train.schema import schema

disable_progress_bars()


@schema
class DataConfig:
    """Where the text is. Paths may be files, folders or globs, one or a list."""

    train: str | list[str]
    validation: str | list[str] | None
    text_field: str
    cache_dir: str


def find_files(paths: str | list[str], key: str) -> list[Path]:
    """The .jsonl, .json and .txt files that paths, folders and globs name, in a fixed order.

    Args:
        key: the config key the paths came from, for the message.

    Raises:
        ValueError: a path that matches nothing, or no path.
    """
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str) else paths:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        # A ** matches folders and the files inside them: each file counts once.
        files = dict.fromkeys(file for match in matches for file in _text_files(Path(match)))
        if not files:
            raise ValueError(
                f"{key}: no .jsonl, .json or .txt file at {path!r} (looked from {Path.cwd()}); "
                "correct the path; a quickstart's corpus is written by its script, see the preset in configs/config"
            )
        found += files
    if not found:
        raise ValueError(f"{key} is empty; give files, folders or globs")
    return found


def _text_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix in (".jsonl", ".json", ".txt"))
    if not path.is_file():  # a pipe would be waited for without end
        raise ValueError(f"{path}: not a regular file")
    return [path]


def read_documents(files: list[Path], text_field: str) -> IterableDataset:
    """Stream the records ``{"text": ...}`` of files; a .txt file is one document, a json file has one a line.

    Iterating raises ValueError, naming file and line, for anything that is not a record with text.
    """
    return IterableDataset.from_generator(
        _records, gen_kwargs={"files": [str(file) for file in files], "text_field": text_field}
    )


def _records(files: list[str], text_field: str) -> Iterator[dict[str, str]]:
    for file in files:
        try:
            if file.endswith(".txt"):
                text = Path(file).read_text(encoding="utf-8")
                if not text.strip():
                    raise ValueError(f"{file}: no text in it; remove it from the data")
                yield {"text": text}
            else:
                yield from _jsonl_records(file, text_field)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror})") from None


def _jsonl_records(file: str, text_field: str) -> Iterator[dict[str, str]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield {"text": _text_of(line, f"{file}:{number}", text_field)}


def _text_of(line: bytes, where: str, text_field: str) -> str:
    try:
        record: Any = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start} of the line); convert it"
        ) from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise ValueError(f"{where}: not a line of JSON ({error}); each line must be one record") from None
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where}: no text in field {text_field!r}; set data.text_field or correct the record")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: the text holds a lone surrogate, which is no valid Unicode") from None
    return text
