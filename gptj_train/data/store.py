"""A file's documents as token ids on disk: written once, memory-mapped by every rank.

A store is a folder of

* ``tokens.bin``: the ids of all documents one after the other, uint16 where they fit, else uint32;
* ``targets.bin``: a byte for each of them, 1 where it is to be predicted; absent where all are;
* ``documents.bin``: a record for each document: where it ends in tokens.bin, its UTF-8 bytes, its component;
* ``store.json``: the counts, sizes, and the names of the components. It comes last: a folder without it is none.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gptj_train.data.sources import Segment
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError

FORMAT = 2
"""Raise when reading or tokenizing changes what it writes, so that no old store is taken for a new one."""

_DOCUMENT = np.dtype([("end", np.int64), ("bytes", np.int64), ("component", np.uint16)])
_MOST_COMPONENTS = 2**16
_CHARACTERS_AT_ONCE = 4_000_000


class TokenStore:
    """The documents of one file.

    Attributes:
        tokens: (N) unsigned, memory-mapped.
        targets: (N) bool, memory-mapped; None where every token is to be predicted.
        ends: (D) int64, one past the last token of each document.
        bytes: (D) int64, of its text.
        components: (D) uint16, numbers of names in ``names``.
        skipped: reason -> records left out.
    """

    def __init__(self, folder: Path) -> None:
        told = json.loads((folder / "store.json").read_text())
        documents = _mapped(folder / "documents.bin", _DOCUMENT)
        self.tokens = _mapped(folder / "tokens.bin", np.dtype(told["dtype"]))
        flags = folder / "targets.bin"
        self.targets = _mapped(flags, np.dtype(np.bool_)) if flags.exists() else None
        self.ends, self.bytes, self.components = documents["end"], documents["bytes"], documents["component"]
        self.names: list[str] = told["components"]
        self.skipped: dict[str, int] = told["skipped"]

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether there is a whole one: its files have the sizes that they were given."""
        try:
            sizes = json.loads((folder / "store.json").read_text())["bytes"]
            return all((folder / name).stat().st_size == size for name, size in sizes.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False


def write_store(
    folder: Path, segments: Iterable[Segment], skipped: Counter[str], tokenizer: Tokenizer, all_targets: bool
) -> None:
    """Tokenize the documents of a file into a folder that exists and is empty. Memory does not grow with the file.

    Args:
        skipped: filled while the segments are read.
        all_targets: every token is to be predicted; no flags are written.
    """
    dtype = np.uint16 if tokenizer.largest_id < 2**16 else np.uint32
    names: dict[str, int] = {}
    end = size = 0
    with contextlib.ExitStack() as stack:
        tokens, targets, documents = (
            stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in ("tokens", "targets", "documents")
        )
        for batch in _batches(segments):
            rows = []
            for segment, ids in zip(batch, _encoded(batch, tokenizer), strict=True):
                ids += [tokenizer.end_id] if segment.last else []
                np.array(ids, dtype=dtype).tofile(tokens)
                if not all_targets:
                    np.full(len(ids), segment.target).tofile(targets)
                end, size = end + len(ids), size + len(segment.text.encode())
                if segment.last:
                    rows.append((end, size, names.setdefault(segment.component, len(names))))
                    size = 0
            if len(names) > _MOST_COMPONENTS:
                raise UserError(f"data.component_field: more than {_MOST_COMPONENTS:,} components; name another field")
            np.array(rows, dtype=_DOCUMENT).tofile(documents)
    if all_targets:
        (folder / "targets.bin").unlink()
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    told: dict[str, Any] = {
        "dtype": np.dtype(dtype).name, "components": list(names), "skipped": dict(skipped), "bytes": sizes
    }  # fmt: skip
    (folder / "store.json").write_text(json.dumps(told) + "\n")


def _batches(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    batch, characters = [], 0
    for segment in segments:
        batch.append(segment)
        characters += len(segment.text)
        if characters > _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(batch: list[Segment], tokenizer: Tokenizer) -> Iterator[list[int]]:
    texts = iter(tokenizer.encode_texts([segment.text for segment in batch if not segment.template]))
    for segment in batch:
        yield tokenizer.encode(segment.text) if segment.template else next(texts)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
