"""Packed windows on disk: written once, memory-mapped by every rank, found again by content."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from gptj_train.data.packing import PADDING, pack
from gptj_train.data.sources import DataConfig, find_files, read_documents
from gptj_train.data.tokenizer import Tokenizer

FORMAT = 1
"""Raise when packing changes what it writes, so that no old cache is taken for a new one."""

_DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class PackingCounts:
    """What went in and came out. tokens counts the end-of-text ids; bytes is UTF-8 text."""

    documents: int
    bytes: int
    tokens: int
    windows: int
    padding: int

    def __str__(self) -> str:
        fill = self.tokens / (self.tokens + self.padding)
        return (
            f"{self.documents:,} documents, {self.bytes / 1e6:,.1f} MB, {self.tokens:,} tokens "
            f"in {self.windows:,} windows, {fill:.2%} full"
        )


@dataclass(frozen=True)
class PackedWindows:
    """Memory-mapped windows: tokens (W, T) unsigned, document_ids (W, T) uint16."""

    tokens: np.ndarray
    document_ids: np.ndarray
    counts: PackingCounts

    def __len__(self) -> int:
        return len(self.tokens)


def prepare(data: DataConfig, tokenizer: Tokenizer, length: int) -> tuple[PackedWindows, PackedWindows | None]:
    """Training and held-out windows of ``length`` tokens; the files are all looked for before any is read.

    Raises:
        ValueError: see ``find_files`` and ``packed_windows``.
    """
    train = find_files(data.train, "data.train")
    validation = find_files(data.validation, "data.validation") if data.validation else []
    windows = [
        packed_windows(files, tokenizer, length, data.text_field, data.cache_dir)
        for files in (train, validation)
        if files
    ]
    return windows[0], windows[1] if validation else None


def packed_windows(
    files: list[Path], tokenizer: Tokenizer, length: int, text_field: str, cache_dir: str | Path
) -> PackedWindows:
    """Tokenize and pack the files, or open what an earlier call with equal inputs wrote.

    Any number of processes may call this at once, without a process group: the first one works, the
    others wait for its lock.

    Raises:
        ValueError: a bad record (file:line), no text at all, or windows without a next token or too long for
            uint16 document ids.
    """
    if not 2 <= length < 2**16:
        raise ValueError(f"sequence_length must be from 2 to {2**16 - 1} tokens, got {length}")
    folder = Path(cache_dir) / _key(files, tokenizer, length, text_field)
    if not (folder / "counts.json").exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"data.cache_dir={cache_dir}: not a folder to write to ({error.strerror})") from None
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / "counts.json").exists():
                _write(folder, files, tokenizer, length, text_field)
    counts = PackingCounts(**json.loads((folder / "counts.json").read_text()))
    shape = (counts.windows, length)
    return PackedWindows(
        np.memmap(folder / "tokens.bin", _token_dtype(tokenizer), "r", shape=shape),
        np.memmap(folder / "document_ids.bin", np.uint16, "r", shape=shape),
        counts,
    )


def _key(files: list[Path], tokenizer: Tokenizer, length: int, text_field: str) -> str:
    identity = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = json.dumps([FORMAT, tokenizer.digest, length, text_field, identity])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _token_dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.largest_id < 2**16 else np.uint32


def _write(folder: Path, files: list[Path], tokenizer: Tokenizer, length: int, text_field: str) -> None:
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        counter = _Counter()
        stream = counter.watch(_batches(files, text_field), tokenizer)
        with open(scratch / "tokens.bin", "wb") as tokens, open(scratch / "document_ids.bin", "wb") as owners:
            for window, owner in pack(stream, length, fill=tokenizer.end_id):
                window.astype(_token_dtype(tokenizer)).tofile(tokens)
                owner.astype(np.uint16).tofile(owners)
                counter.windows += 1
                counter.padding += int((owner == PADDING).sum())
        if not counter.windows:
            raise ValueError(f"{', '.join(map(str, files[:3]))}: no text to train on, the data is empty")
        assert counter.tokens + counter.padding == counter.windows * length
        (scratch / "counts.json").write_text(json.dumps(asdict(counter.counts())))
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _batches(files: list[Path], text_field: str) -> Iterator[list[str]]:
    for batch in read_documents(files, text_field).iter(batch_size=_DOCUMENTS_AT_ONCE):
        yield batch["text"]


class _Counter:
    def __init__(self) -> None:
        self.documents = self.bytes = self.tokens = self.windows = self.padding = 0

    def watch(self, batches: Iterator[list[str]], tokenizer: Tokenizer) -> Iterator[list[int]]:
        """Tokenize, counting what passes."""
        for texts in batches:
            for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
                self.documents += 1
                self.bytes += len(text.encode())
                self.tokens += len(ids)
                yield ids

    def counts(self) -> PackingCounts:
        return PackingCounts(self.documents, self.bytes, self.tokens, self.windows, self.padding)
