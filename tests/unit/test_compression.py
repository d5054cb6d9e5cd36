"""Compressed files are read whole or refused: cut, damaged, mislabelled, or a bomb."""

from __future__ import annotations

import gzip
import random
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard

from gptj_train.data.files import LONGEST_LINE, chunks, numbered_lines

RANDOM = random.Random(0)
TEXT = "".join(RANDOM.choice("abcdefgh \n") for _ in range(30_000)).encode()
ZSTD = zstandard.ZstdCompressor(write_checksum=True).compress(TEXT)
GZIP = gzip.compress(TEXT)
SKIPPABLE = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"


def content(path: Path, stored: bytes) -> bytes:
    path.write_bytes(stored)
    return b"".join(read(path))


def read(path: Path) -> Iterator[bytes]:
    return chunks(path, lambda size: None)


@pytest.mark.parametrize(
    ("name", "stored", "plain"),
    [
        ("a.jsonl", TEXT, TEXT),
        ("a.jsonl.zst", ZSTD, TEXT),
        ("a.jsonl.zst", ZSTD * 3, TEXT * 3),
        ("a.jsonl.zst", SKIPPABLE + ZSTD + SKIPPABLE, TEXT),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(b""), b""),
        ("a.jsonl.gz", GZIP, TEXT),
        ("a.jsonl.gz", GZIP * 2, TEXT * 2),
        ("a.jsonl", b"", b""),
    ],
    ids=["plain", "zst", "zst of several frames", "zst with skippable frames", "empty zst", "gz", "gz twice", "empty"],
)
def test_whole_files(tmp_path: Path, name: str, stored: bytes, plain: bytes) -> None:
    assert content(tmp_path / name, stored) == plain


def test_progress_is_told_in_stored_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.zst").write_bytes(ZSTD)
    told: list[int] = []
    assert len(b"".join(chunks(tmp_path / "a.zst", told.append))) == len(TEXT)
    assert sum(told) == len(ZSTD)


@pytest.mark.parametrize(("name", "whole"), [("a.zst", ZSTD), ("a.gz", GZIP), ("a.zst", ZSTD + ZSTD)])
def test_every_cut_is_reported(tmp_path: Path, name: str, whole: bytes) -> None:
    ends = {0, len(ZSTD)} if len(whole) > len(ZSTD) else {0}  # two frames cut between them are one whole frame
    for cut in {RANDOM.randrange(1, len(whole)) for _ in range(300)} - ends:
        with pytest.raises(ValueError, match=r"a\.(zst|gz): .*cut off .*; fetch it again$"):
            content(tmp_path / name, whole[:cut])


def test_an_empty_file_is_no_zstd_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.zst: cut off in the middle"):
        content(tmp_path / "a.zst", b"")


@pytest.mark.parametrize(("name", "whole"), [("a.zst", ZSTD), ("a.gz", GZIP)])
def test_every_flipped_bit_is_reported_or_harmless(tmp_path: Path, name: str, whole: bytes) -> None:
    reported = 0
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[RANDOM.randrange(len(whole))] ^= 1 << RANDOM.randrange(8)
        with suppress(ValueError):
            assert content(tmp_path / name, bytes(flipped)) == TEXT  # as in the time that a gzip header holds
            continue
        reported += 1
    assert reported > 285


@pytest.mark.parametrize(
    ("name", "stored"),
    [("a.zst", GZIP), ("a.zst", TEXT), ("a.gz", ZSTD), ("a.gz", TEXT), ("a.zst", ZSTD + b"garbage")],
)
def test_another_kind_of_file(tmp_path: Path, name: str, stored: bytes) -> None:
    with pytest.raises(ValueError, match=r"damaged or cut off \(.+\); fetch it again$"):
        content(tmp_path / name, stored)


@pytest.mark.parametrize("name", ["a.zst", "a.gz"])
def test_a_bomb_is_stopped_early(tmp_path: Path, name: str) -> None:
    with open(tmp_path / name, "wb") as stored:
        if name == "a.zst":
            with zstandard.ZstdCompressor().stream_writer(stored, closefd=False) as writer:
                for _ in range(1024):
                    writer.write(bytes(2**20))
        else:
            with gzip.GzipFile(fileobj=stored, mode="wb", compresslevel=1) as writer:
                for _ in range(256):
                    writer.write(b"\n" * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name == "a.gz":  # deflate grows at most 1,032 times; its fastest level, 200 times
        assert sum(map(len, read(tmp_path / name))) == 2**28
    else:
        with pytest.raises(ValueError, match="refused, it unpacks to more than 1000 times its size"):
            list(read(tmp_path / name))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10


def test_a_window_too_large_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    with (
        open(tmp_path / "a.zst", "wb") as stored,
        zstandard.ZstdCompressor(compression_params=parameters).stream_writer(stored) as writer,
    ):
        writer.write(TEXT)
    with pytest.raises(ValueError, match=r"damaged or cut off .*memory"):
        list(read(tmp_path / "a.zst"))


def test_a_line_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LONGEST_LINE == 2**28
    monkeypatch.setattr("gptj_train.data.files.LONGEST_LINE", 3 * 2**20)
    (tmp_path / "a.jsonl").write_bytes(b"x\n" + b"y" * 5 * 2**20 + b"\nz\n")
    lines = numbered_lines(tmp_path / "a.jsonl", lambda size: None)
    assert next(lines) == (1, b"x")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the line is longer than 3 MiB"):
        list(lines)


def test_lines_are_numbered_however_they_are_cut_into_chunks(tmp_path: Path) -> None:
    written = [bytes([97 + number % 26]) * (number * 997 % 90_000) for number in range(100)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(written))
    assert list(numbered_lines(tmp_path / "a.jsonl", lambda size: None)) == list(enumerate(written, start=1))
