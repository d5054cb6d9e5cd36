"""A file's documents as token ids on disk: written once, memory-mapped by every rank.

A store is a folder of

* ``tokens.bin``: the token ids of all documents, concatenated; uint16 where they fit, else uint32;
* ``targets.bin``: a byte for each token, 1 if it is to be predicted; absent if all are;
* ``documents.bin``: a record for each document: where it ends in tokens.bin, its UTF-8 bytes, its component, a hash of
  its text;
* ``store.json``: dtype, component names, skipped records, spelt special tokens and file sizes. It is written last: a
  folder without it is not a store.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gptj_train.data.held_out_share import content_hasher, hash_number
from gptj_train.data.joint_encoding import encode_joined
from gptj_train.data.records import Segment
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError

FORMAT = 4
"""Part of every store's name: raise it if reading or tokenizing changes, so that no old store is reused."""

_DOCUMENT = np.dtype([("end", np.int64), ("bytes", np.int64), ("component", np.uint16), ("hash", np.uint64)])
_MOST_COMPONENTS = 2**16  # what uint16 can count
# Enough text to keep all cores busy; a few times as many bytes of memory.
_CHARACTERS_AT_ONCE = 4_000_000


class TokenStore:
    """The documents of one file.

    Attributes:
        folder: of its files.
        tokens: (N) uint16 or uint32, memory-mapped.
        targets: (N) bool, memory-mapped; None if every token is to be predicted.
        ends: (D) int64, one past the last token of each document.
        bytes: (D) int64, UTF-8 bytes of each document's text.
        components: (D) uint16, index of each document's component in ``names``.
        hashes: (D) uint64, of each document's text, template included.
        names: of the components, in the order of their first documents.
        skipped: reason -> number of records left out.
        special_tokens: special token -> how often the data spell it.
    """

    def __init__(self, folder: Path) -> None:
        metadata = json.loads((folder / "store.json").read_text())
        self.folder = folder
        self.names: list[str] = metadata["components"]
        self.skipped: dict[str, int] = metadata["skipped"]
        self.special_tokens: dict[str, int] = metadata["special_tokens"]
        self._dtype = np.dtype(metadata["dtype"])
        sizes = metadata["bytes"]
        self._has_targets = "targets.bin" in sizes
        self._documents = sizes["documents.bin"] // _DOCUMENT.itemsize

    def __len__(self) -> int:
        """Return the number of documents."""
        return int(self._documents)

    @property
    def tokens(self) -> np.ndarray:
        return mapped(self.folder / "tokens.bin", self._dtype)

    @property
    def targets(self) -> np.ndarray | None:
        return mapped(self.folder / "targets.bin", np.dtype(np.bool_)) if self._has_targets else None

    @property
    def ends(self) -> np.ndarray:
        return self._column("end")

    @property
    def bytes(self) -> np.ndarray:
        return self._column("bytes")

    @property
    def components(self) -> np.ndarray:
        return self._column("component")

    @property
    def hashes(self) -> np.ndarray:
        return self._column("hash")

    def _column(self, name: str) -> np.ndarray:
        column: np.ndarray = mapped(self.folder / "documents.bin", _DOCUMENT)[name]
        return column

    def part(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray | bool]:
        """Return token ids and target flags of a run of tokens; the flags are True if all are targets."""
        span = slice(start, start + length)
        targets = self.targets
        return self.tokens[span], True if targets is None else targets[span]

    @staticmethod
    def exists(folder: Path) -> bool:
        """Return whether there is a complete store."""
        return (folder / "store.json").exists() and not damage_of(folder)


def damage_of(folder: Path) -> str:
    """Return why a store cannot be used; empty if it is whole: all files have the sizes that store.json gives.

    Clusters that delete old files may leave a part of one. To read a memory-mapped file beyond its end kills a process
    without a word.
    """
    try:
        metadata = json.loads((folder / "store.json").read_text())
        _check_metadata(metadata)
        for name, expected in metadata["bytes"].items():
            size = (folder / name).stat().st_size
            if size != expected:
                return f"{name} has {size:,} bytes instead of {expected:,}"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "its store.json is damaged"
    return ""


def _check_metadata(metadata: dict[str, Any]) -> None:
    """Raise one of several errors for a store.json that ``write_store`` did not write."""
    names, sizes = metadata["components"], metadata["bytes"]
    if metadata["dtype"] not in ("uint16", "uint32") or not {"tokens.bin", "documents.bin"} <= sizes.keys():
        raise ValueError("dtype or bytes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("components")
    for counts in (metadata["skipped"], metadata["special_tokens"], sizes):
        if not all(type(count) is int and count >= 0 for count in counts.values()):
            raise ValueError("counts")


def write_store(
    folder: Path,
    segments: Iterable[Segment],
    tokenizer: Tokenizer,
    *,
    skipped: Counter[str],
    all_targets: bool,
    special_tokens: str = "text",
) -> None:
    """Tokenize the documents of a file into an empty folder. Memory does not grow with the file.

    Args:
        skipped: reason -> records left out; it may be filled while the segments are read.
        all_targets: every token is to be predicted: no targets.bin is written.
        special_tokens: what data that spells special tokens becomes, "text" or "tokens".

    Raises:
        UserError: too many components.
    """
    dtype = np.dtype(np.uint16 if tokenizer.largest_id < 2**16 else np.uint32)
    components: dict[str, int] = {}
    spelt = Counter[str]()
    with (
        open(folder / "tokens.bin", "wb") as token_file,
        open(folder / "targets.bin", "wb") as target_file,
        open(folder / "documents.bin", "wb") as document_file,
    ):
        end = 0  # of the tokens so far
        size = 0  # bytes of the current document so far
        content = content_hasher()  # of the current document so far
        for batch in _batches(segments):
            documents = []
            for segment in batch:
                if not segment.template:
                    spelt.update(tokenizer.spelt_special_tokens(segment.text))
            for segment, ids in zip(batch, _encode(batch, tokenizer, special_tokens), strict=True):
                if segment.last:
                    ids.append(tokenizer.eos_id)
                np.array(ids, dtype=dtype).tofile(token_file)
                if not all_targets:
                    np.full(len(ids), segment.target).tofile(target_file)
                end += len(ids)
                text = segment.text.encode()
                size += len(text)
                content.update(text)
                if segment.last:
                    component = components.setdefault(segment.component, len(components))
                    documents.append((end, size, component, hash_number(content)))
                    size = 0
                    content = content_hasher()
            if len(components) > _MOST_COMPONENTS:
                raise UserError(f"data.component_field: more than {_MOST_COMPONENTS:,} components; name another field")
            np.array(documents, dtype=_DOCUMENT).tofile(document_file)
    if all_targets:
        (folder / "targets.bin").unlink()
    metadata: dict[str, Any] = {
        "dtype": dtype.name,
        "components": list(components),
        # Only now, when all segments have been read, are the skipped records complete.
        "skipped": dict(skipped),
        "special_tokens": dict(spelt),
        "bytes": {path.name: path.stat().st_size for path in folder.iterdir()},
    }
    (folder / "store.json").write_text(json.dumps(metadata) + "\n")


def _batches(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    """Group segments into batches of about ``_CHARACTERS_AT_ONCE``."""
    batch: list[Segment] = []
    characters = 0
    for segment in segments:
        # A batch ends where a text does.
        if characters > _CHARACTERS_AT_ONCE and not segment.joined:
            yield batch
            batch = []
            characters = 0
        batch.append(segment)
        characters += len(segment.text)
    if batch:
        yield batch


def _encode(batch: list[Segment], tokenizer: Tokenizer, special_tokens: str) -> Iterator[list[int]]:
    """Tokenize segments: special tokens count as such in a template, and in data if that is asked for.

    The tokens of joined segments are those of their joint text. A token of two segments belongs to the later one.
    """
    as_tokens = special_tokens == "tokens"
    if any(segment.joined for segment in batch):
        yield from encode_joined(batch, tokenizer, special_tokens=as_tokens)
        return
    data = [segment.text for segment in batch if not segment.template]
    ids_of_data = iter(tokenizer.encode_texts(data, special_tokens=as_tokens))
    for segment in batch:
        yield tokenizer.encode(segment.text) if segment.template else next(ids_of_data)


@lru_cache(maxsize=128)
def mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """Map a file of the cache, which never changes, into memory.

    Each mapping keeps a file descriptor, of which a process usually has 1024: those used least recently are closed.
    """
    if path.stat().st_size == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, "r")
