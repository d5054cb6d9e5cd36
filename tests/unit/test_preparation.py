"""Packed windows on disk: what packing gives, written once, whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gptj_train.data.cache import PackedWindows, packed_windows, prepare
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from gptj_train.data.packing import PADDING, pack
from gptj_train.data.sources import DataConfig
from gptj_train.data.tokenizer import Tokenizer

DOCUMENTS = [f"Document {number}: " + "naïve words, 東京 🙂 " * (number % 7) for number in range(300)]
LENGTH = 48


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "cache"


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def same(one: PackedWindows, other: PackedWindows) -> bool:
    tokens, owners = one.tokens, one.document_ids
    return (
        np.array_equal(tokens, other.tokens)
        and np.array_equal(owners, other.document_ids)
        and one.counts == other.counts
    )


def test_windows_are_those_of_packing(file: Path, cache: Path, tokenizer: Tokenizer) -> None:
    windows = packed_windows([file], tokenizer, LENGTH, "text", cache)
    expected = list(pack(tokenizer.encode_documents(DOCUMENTS), LENGTH, tokenizer.end_id))
    assert len(windows) == len(expected)
    assert np.array_equal(windows.tokens, [tokens for tokens, _ in expected])
    assert np.array_equal(windows.document_ids, [owners for _, owners in expected])
    assert windows.document_ids.dtype == np.uint16
    assert not windows.tokens.flags.writeable


def test_counts_are_exact(file: Path, cache: Path, tokenizer: Tokenizer) -> None:
    windows = packed_windows([file], tokenizer, LENGTH, "text", cache)
    counts, tokens = windows.counts, sum(map(len, tokenizer.encode_documents(DOCUMENTS)))
    assert counts.documents == 300
    assert counts.bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert counts.tokens == tokens == int((windows.document_ids != PADDING).sum())
    assert counts.windows == len(windows) == -(-tokens // LENGTH)
    assert counts.padding == int((windows.document_ids == PADDING).sum()) == counts.windows * LENGTH - tokens
    assert int((windows.tokens[windows.document_ids != PADDING] == tokenizer.end_id).sum()) == 300
    assert tokenizer.bytes_per_token[windows.tokens].sum() == counts.bytes


def test_counts_in_words(file: Path, cache: Path, tokenizer: Tokenizer) -> None:
    said = str(packed_windows([file], tokenizer, LENGTH, "text", cache).counts)
    assert said.startswith("300 documents, 0.0 MB, ")
    assert said.endswith("% full")


def test_a_second_call_reads_what_the_first_wrote(file: Path, cache: Path, tokenizer: Tokenizer) -> None:
    first = packed_windows([file], tokenizer, LENGTH, "text", cache)
    (folder,) = folders(cache)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {path.name for path in times} == {"tokens.bin", "document_ids.bin", "counts.json"}
    second = packed_windows([file], Tokenizer(tokenizer._backend), LENGTH, "text", cache)
    assert same(first, second)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert folders(cache) == [folder]


def test_whatever_changes_the_windows_makes_others(file: Path, cache: Path, tokenizer: Tokenizer) -> None:
    other = Tokenizer.train(DOCUMENTS, 300)
    both = '{"text": "one", "body": "quite another text"}\n'
    file.write_text(both)
    before = packed_windows([file], tokenizer, LENGTH, "text", cache)
    packed_windows([file], tokenizer, LENGTH + 1, "text", cache)
    packed_windows([file], other, LENGTH, "text", cache)
    packed_windows([file], tokenizer, LENGTH, "body", cache)
    packed_windows([file, file], tokenizer, LENGTH, "text", cache)
    file.write_text(both + '{"text": "one more"}\n')
    after = packed_windows([file], tokenizer, LENGTH, "text", cache)
    assert len(folders(cache)) == 6
    assert (before.counts.documents, after.counts.documents) == (1, 2)


def test_an_edit_that_keeps_the_size_is_seen(file: Path, cache: Path, tokenizer: Tokenizer) -> None:
    file.write_text('{"text": "aaaa"}\n')
    os.utime(file, ns=(0, 0))
    packed_windows([file], tokenizer, LENGTH, "text", cache)
    file.write_text('{"text": "bbbb"}\n')
    edited = packed_windows([file], tokenizer, LENGTH, "text", cache)
    assert tokenizer.decode(edited.tokens[0].tolist()) == "bbbb"


@pytest.mark.parametrize("spoilt", ['{"text": ""}\n', "broken\n"])
def test_an_error_leaves_no_folder(file: Path, cache: Path, tokenizer: Tokenizer, spoilt: str) -> None:
    good = file.read_text()
    file.write_text(good + spoilt)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"train\.jsonl:301: "):
            packed_windows([file], tokenizer, LENGTH, "text", cache)
        assert folders(cache) == []
    file.write_text(good)
    assert packed_windows([file], tokenizer, LENGTH, "text", cache).counts.documents == 300


@pytest.mark.parametrize("content", ["", "\n", "\n  \n\n"])
def test_no_text_at_all(file: Path, cache: Path, tokenizer: Tokenizer, content: str) -> None:
    file.write_text(content)
    with pytest.raises(ValueError, match=r"train\.jsonl: no text to train on, the data is empty"):
        packed_windows([file], tokenizer, LENGTH, "text", cache)
    assert folders(cache) == []


TWIN = """
import sys
from pathlib import Path
from gptj_train.data.cache import packed_windows
from gptj_train.data.tokenizer import Tokenizer
file, tokenizer, cache = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
windows = packed_windows([Path(file)], Tokenizer.load(tokenizer), 48, "text", cache)
print(windows.counts, int(windows.tokens.astype(int).sum()))
"""


def test_two_processes_at_once(file: Path, cache: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    file.write_text(file.read_text() * 10)
    command = [sys.executable, "-c", TWIN, str(file), str(tmp_path / "tokenizer.json"), str(cache)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    twins = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [twin.stdout.readline() for twin in twins] == ["ready\n"] * 2
    for twin in twins:
        twin.stdin.write("go\n")
        twin.stdin.flush()
    said = [twin.communicate(timeout=120)[0] for twin in twins]
    # Had both written, the second could not have renamed its folder.
    assert [twin.returncode for twin in twins] == [0, 0]
    assert said[0] == said[1]
    (folder,) = folders(cache)
    here = packed_windows([file], tokenizer, 48, "text", cache)
    assert said[0] == f"{here.counts} {int(here.tokens.astype(int).sum())}\n"
    assert folders(cache) == [folder]


@pytest.mark.parametrize(("largest", "dtype"), [(65535, np.uint16), (65536, np.uint32)])
def test_ids_are_as_wide_as_the_vocabulary_needs(file: Path, cache: Path, largest: int, dtype: type) -> None:
    words = {f"w{number}": number for number in range(1, largest + 1)}
    backend = Backend(models.WordLevel({"<|endoftext|>": 0, **words}, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    file.write_text(json.dumps({"text": f"w{largest} w1"}))
    windows = packed_windows([file], Tokenizer(backend), 4, "text", cache)
    assert windows.tokens.dtype == dtype
    assert windows.tokens.tolist() == [[largest, 1, 0, 0]]
    assert windows.document_ids.tolist() == [[1, 1, 1, 0]]


@pytest.mark.parametrize("length", [-1, 0, 1, 65536])
def test_lengths_that_make_no_windows(file: Path, cache: Path, tokenizer: Tokenizer, length: int) -> None:
    with pytest.raises(ValueError, match=f"sequence_length must be from 2 to 65535 tokens, got {length}"):
        packed_windows([file], tokenizer, length, "text", cache)


def test_prepare_training_and_held_out(file: Path, cache: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("another text")
    data = DataConfig(train=str(file), validation=[str(held_out)], text_field="text", cache_dir=str(cache))
    train, validation = prepare(data, tokenizer, LENGTH)
    assert train.counts.documents == 300
    assert validation is not None
    assert tokenizer.decode(validation.tokens[0].tolist()) == "another text"


@pytest.mark.parametrize("nothing", [None, []])
def test_prepare_without_held_out_text(file: Path, cache: Path, tokenizer: Tokenizer, nothing: list | None) -> None:
    data = DataConfig(train=[str(file)], validation=nothing, text_field="text", cache_dir=str(cache))
    assert prepare(data, tokenizer, LENGTH)[1] is None


@pytest.mark.parametrize(("train", "validation"), [("here", "gone"), ("gone", "here"), ([], "here")])
def test_prepare_looks_for_all_files_first(
    file: Path, cache: Path, tokenizer: Tokenizer, train: str | list[str], validation: str
) -> None:
    paths = {"here": str(file), "gone": f"{file}.gone"}
    data = DataConfig(
        train=paths[train] if isinstance(train, str) else train,
        validation=paths[validation],
        text_field="text",
        cache_dir=str(cache),
    )
    with pytest.raises(ValueError, match="^data.validation: no" if validation == "gone" else "^data.train"):
        prepare(data, tokenizer, LENGTH)
    assert not cache.exists()
