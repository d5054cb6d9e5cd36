"""Packings on disk: made once, equal to a packing in memory, and opened with few descriptors."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_data import jsonl, text_data

from gptj_train.data import packed
from gptj_train.data.held_out_share import HeldOutShare
from gptj_train.data.packed import Part, open_packing
from gptj_train.data.packing import Method, Packing, Windows, pack
from gptj_train.data.preparation import open_stores
from gptj_train.data.store import TokenStore, mapped
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError

LENGTH = 32


@pytest.fixture
def stores(tmp_path: Path, tokenizer: Tokenizer) -> list[TokenStore]:
    files = []
    for name, count in (("a", 40), ("b", 25)):
        rows = [f"{name} text, number {n} of it " * (1 + n % 9) for n in range(count)]
        files.append(jsonl(tmp_path / f"{name}.jsonl", *rows))
    return open_stores(files, text_data(cache_dir=str(tmp_path / "cache")), tokenizer)


def equal(one: Packing, other: Packing) -> bool:
    return (
        np.array_equal(one.pieces, other.pieces)
        and np.array_equal(one.first_piece, other.first_piece)
        and one.facts == other.facts
    )


@pytest.mark.parametrize("component", [None, "a", "b", "unknown"])
@pytest.mark.parametrize("method", ["contiguous", "text", "examples"])
def test_a_packing_on_disk_is_that_in_memory(
    stores: list[TokenStore], tmp_path: Path, method: Method, component: str | None
) -> None:
    made = pack(stores, component, method=method, length=LENGTH)
    for _ in range(2):  # made, then found
        found = open_packing(stores, component, cache=tmp_path / "cache", method=method, length=LENGTH)
        assert equal(found, made)
    assert made.facts.documents == {None: 65, "a": 40, "b": 25, "unknown": 0}[component]
    assert sum(made.facts.length_counts) == made.facts.documents


def test_a_packing_is_made_once(stores: list[TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def counted(*args: Any, **options: Any) -> Packing:
        made.append(options)
        return pack(*args, **options)

    monkeypatch.setattr(packed, "pack", counted)

    def open_it(length: int = LENGTH, stores: list[TokenStore] = stores) -> None:
        open_packing(stores, None, cache=tmp_path / "cache", method="text", length=length)

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    # Whatever changes the windows makes another packing.
    open_it(length=LENGTH + 1)
    open_it(stores=stores[::-1])
    assert len(made) == 3


def test_the_sides_of_a_held_out_share_are_packings_of_their_own(stores: list[TokenStore], tmp_path: Path) -> None:
    rule = HeldOutShare(0.2, 3)
    mask = rule.split(np.concatenate([store.hashes for store in stores]))
    for held in (True, False, True):
        part = Part(rule, held)
        found = open_packing(stores, None, cache=tmp_path / "cache", method="text", length=LENGTH, part=part)
        own = mask if held else ~mask
        assert equal(found, pack(stores, None, method="text", length=LENGTH, own=own))
        assert found.facts.documents == own.sum() == (13 if held else 52)


def test_a_packing_cut_short_by_a_kill_is_made_again(
    stores: list[TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> str:
        raise KilledError

    cache = tmp_path / "cache"
    with monkeypatch.context() as patched:
        patched.setattr(packed.json, "dumps", killed)
        with pytest.raises(KilledError):
            open_packing(stores, None, cache=cache, method="text", length=LENGTH)
    found = open_packing(stores, None, cache=cache, method="text", length=LENGTH)
    assert equal(found, pack(stores, None, method="text", length=LENGTH))


@pytest.mark.parametrize("name", ["pieces.bin", "windows.bin", "packing.json"])
def test_a_packing_that_lost_a_part_is_made_again(stores: list[TokenStore], tmp_path: Path, name: str) -> None:
    cache = tmp_path / "cache"
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:16]), Path.unlink):
        open_packing(stores, None, cache=cache, method="text", length=LENGTH)
        (file,) = cache.glob(f"packed_*/{name}")
        damage(file)
        mapped.cache_clear()  # as in a new process
        found = open_packing(stores, None, cache=cache, method="text", length=LENGTH)
        assert equal(found, pack(stores, None, method="text", length=LENGTH))


def test_a_disk_that_cannot_be_written_is_one_line(
    stores: list[TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed, "_write", full)
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write into .*cache \(No space left on device\)"):
        open_packing(stores, None, cache=tmp_path / "cache", method="text", length=LENGTH)


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    mapped.cache_clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_descriptors")
def test_more_files_than_descriptors(tmp_path: Path, tokenizer: Tokenizer) -> None:
    files = [jsonl(tmp_path / f"{number}.jsonl", f"text {number} " * 3) for number in range(220)]
    stores = open_stores(files, text_data(cache_dir=str(tmp_path / "cache")), tokenizer)
    packing = open_packing(stores, None, cache=tmp_path / "cache", method="text", length=LENGTH)
    windows = Windows(stores, packing, length=LENGTH, fill=tokenizer.eos_id)
    read = "".join(tokenizer.decode_all(windows[index].tokens.tolist()) for index in range(len(windows)))
    assert all(f"text {number} " in read for number in range(220))
