"""Token stores: a file is tokenized once, whole or not at all, whatever the windows and the other files."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_data import DEFAULTS, data_config
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from gptj_train.data.corpus import prepare
from gptj_train.data.preparation import open_stores
from gptj_train.data.store import TokenStore
from gptj_train.data.tokenizer import Tokenizer

TEXTS = [f"Document {number}: " + "naïve words, 東京 🙂 " * (number % 7) for number in range(300)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "train.jsonl", TEXTS)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "cache"


def written(path: Path, texts: list[str], component: str = "Books") -> Path:
    records = [{"text": text, "meta": {"pile_set_name": component}} for text in texts]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def stores(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()


def opened(files: list[Path], tokenizer: Tokenizer, cache: Path, **changes: Any) -> list[TokenStore]:
    return open_stores(files, data_config(cache_dir=str(cache), **changes), tokenizer)


def test_a_store_holds_the_documents(file: Path, cache: Path, tokenizer: Tokenizer) -> None:
    (store,) = opened([file], tokenizer, cache)
    expected = tokenizer.encode_documents(TEXTS)
    assert store.tokens.tolist() == [token for ids in expected for token in ids]
    assert store.ends.tolist() == np.cumsum([len(ids) for ids in expected]).tolist()
    assert store.bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert (store.targets, store.names, store.skipped) == (None, ["Books"], {})
    assert not store.tokens.flags.writeable


def test_examples_know_what_is_to_be_predicted(tmp_path: Path, cache: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "2 and 3:", "response": " 5<|endoftext|>"}\n')
    (store,) = opened([tmp_path / "a.jsonl"], tokenizer, cache, kind="completion")
    prompt, response = tokenizer.encode_texts(["2 and 3:", " 5<|endoftext|>"])
    assert tokenizer.end_id not in response  # data does not spell special tokens
    assert store.tokens.tolist() == [*prompt, *response, tokenizer.end_id]
    assert store.targets is not None
    assert store.targets.tolist() == [False] * len(prompt) + [True] * (len(response) + 1)


def test_a_template_may_spell_special_tokens(tmp_path: Path, cache: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "assistant", "content": "yes"}]}\n')
    template = "<|endoftext|>{content}"
    (store,) = opened([tmp_path / "a.jsonl"], tokenizer, cache, kind="chat", chat_template=template)
    assert store.tokens.tolist() == [tokenizer.end_id, *tokenizer.encode("yes"), tokenizer.end_id]


def test_a_file_is_tokenized_once(file: Path, cache: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    opened([file], tokenizer, cache)
    (folder,) = stores(cache)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {path.name for path in times} == {"tokens.bin", "documents.bin", "store.json"}
    other = written(tmp_path / "other.jsonl", ["one more"])
    opened([other, file], Tokenizer(tokenizer._backend), cache, packing="best_fit")
    assert len(stores(cache)) == 2
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_whatever_changes_the_tokens_makes_another_store(file: Path, cache: Path, tokenizer: Tokenizer) -> None:
    text = '{"text": "one", "body": "quite another text"}\n'
    file.write_text(text)
    opened([file], tokenizer, cache)
    opened([file], Tokenizer.train(TEXTS, 300), cache)
    opened([file], tokenizer, cache, text_field="body")
    file.write_text(text + '{"text": "one more"}\n')
    (after,) = opened([file], tokenizer, cache)
    assert len(stores(cache)) == 4
    assert len(after.ends) == 2


def test_an_edit_that_keeps_the_size_is_seen(file: Path, cache: Path, tokenizer: Tokenizer) -> None:
    file.write_text('{"text": "aaaa"}\n')
    os.utime(file, ns=(0, 0))
    opened([file], tokenizer, cache)
    file.write_text('{"text": "bbbb"}\n')
    (edited,) = opened([file], tokenizer, cache)
    assert tokenizer.decode(edited.tokens.tolist()) == "bbbb"


@pytest.mark.parametrize("spoilt", ['{"text": ""}\n', "broken\n"])
def test_an_error_leaves_no_store(file: Path, cache: Path, tokenizer: Tokenizer, spoilt: str) -> None:
    good = file.read_text()
    file.write_text(good + spoilt)
    with pytest.raises(ValueError, match=r"train\.jsonl:301: "):
        opened([file], tokenizer, cache)
    assert stores(cache) == []
    file.write_text(good)
    assert len(opened([file], tokenizer, cache)[0].ends) == 300


def test_skipped_records_are_counted_up_to_a_share(file: Path, cache: Path, tokenizer: Tokenizer) -> None:
    good = file.read_text()
    file.write_text(good + '{"text": ""}\nbroken\nbroken too\n')
    (store,) = opened([file], tokenizer, cache, bad_records="skip")
    assert store.skipped == {"no text in field 'text'": 1, "not a line of JSON": 2}
    file.write_text(good + "broken\n" * 4)
    with pytest.raises(ValueError, match=r"1\.32% of the records are bad \(4 of not a line of JSON\), more"):
        opened([file], tokenizer, cache, bad_records="skip")
    assert len(opened([file], tokenizer, cache, bad_records="skip", max_bad_share=0.02)[0].ends) == 300


@pytest.mark.parametrize("content", ["", "\n", "\n  \n\n"])
def test_no_text_at_all(file: Path, cache: Path, tokenizer: Tokenizer, content: str) -> None:
    file.write_text(content)
    with pytest.raises(ValueError, match=r"train\.jsonl: no text in the data, it is empty"):
        opened([file], tokenizer, cache)


def test_processes_write_the_same_bytes_and_tell_what_is_wrong(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [written(tmp_path / f"{number}.jsonl", TEXTS[number::3], f"part {number}") for number in range(3)]
    opened(files, tokenizer, tmp_path / "alone")
    monkeypatch.setattr("gptj_train.data.preparation._SMALL", 0)
    opened(files, tokenizer, tmp_path / "shared")
    alone, shared = ([digest(folder) for folder in stores(tmp_path / name)] for name in ("alone", "shared"))
    assert alone == shared
    assert len(alone) == 3
    files[1].write_text('{"text": 5}\n')
    with pytest.raises(ValueError, match=r"1\.jsonl:1: no text in field 'text'"):
        opened(files, tokenizer, tmp_path / "wrong")
    assert not list((tmp_path / "wrong").glob(".making-*"))


JOB = """
import json
import sys
from pathlib import Path
from gptj_train.data.preparation import open_stores
from gptj_train.data.sources import DataConfig
from gptj_train.data.tokenizer import Tokenizer
data, tokenizer, *files = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
data = DataConfig(**json.loads(data))
stores = open_stores([Path(file) for file in files], data, Tokenizer.load(tokenizer))
print([int(store.tokens.astype(int).sum()) for store in stores])
"""


def start(tmp_path: Path, cache: Path, *files: Path) -> subprocess.Popen[str]:
    data = json.dumps(DEFAULTS | {"cache_dir": str(cache)})
    command = [sys.executable, "-c", JOB, data, str(tmp_path / "tokenizer.json"), *map(str, files)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_at_once(file: Path, cache: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    twins = [start(tmp_path, cache, file) for _ in range(2)]
    said = [twin.communicate("go\n", timeout=120)[0] for twin in twins]
    assert [twin.returncode for twin in twins] == [0, 0]
    assert said[0] == said[1]
    assert len(stores(cache)) == 1


def test_killed_and_begun_again(tmp_path: Path, cache: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path)
    files = [written(tmp_path / f"{number}.jsonl", TEXTS * 40) for number in range(2)]
    process = start(tmp_path, cache, *files)
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    while not list(cache.glob(".making-*/tokens.bin")):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(stores(cache)) > sum((folder / "store.json").exists() for folder in stores(cache))
    opened(files, tokenizer, cache)
    opened(files, tokenizer, tmp_path / "undisturbed")
    assert [digest(folder) for folder in stores(cache)] == [
        digest(folder) for folder in stores(tmp_path / "undisturbed")
    ]


@pytest.mark.parametrize(("largest", "dtype"), [(65535, np.uint16), (65536, np.uint32)])
def test_ids_are_as_wide_as_the_vocabulary_needs(file: Path, cache: Path, largest: int, dtype: type) -> None:
    words = {f"w{number}": number for number in range(1, largest + 1)}
    backend = Backend(models.WordLevel({"<|endoftext|>": 0, **words}, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    file.write_text(json.dumps({"text": f"w{largest} w1"}))
    (store,) = opened([file], Tokenizer(backend), cache)
    assert store.tokens.dtype == dtype
    assert store.tokens.tolist() == [largest, 1, 0]


@pytest.mark.parametrize("length", [-1, 0, 1, 65536])
def test_lengths_that_make_no_windows(file: Path, tokenizer: Tokenizer, length: int) -> None:
    with pytest.raises(ValueError, match=f"sequence_length must be from 2 to 65535 tokens, got {length}"):
        prepare(data_config(train=str(file)), tokenizer, length)


def test_parts_by_component_with_facts(tmp_path: Path, cache: Path, tokenizer: Tokenizer) -> None:
    written(tmp_path / "a.jsonl", TEXTS[:200], "A")
    written(tmp_path / "b.jsonl", TEXTS[200:], "B")
    (tmp_path / "notes.txt").write_text("quite another text")
    both = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    weights = {"B": 3.0, "A": 1.0}
    given = {"train": both, "validation": both, "forgetting": f"{tmp_path}/notes.txt", "cache_dir": str(cache)}
    data = prepare(data_config(**given, weights=weights), tokenizer, 48)
    assert list(data.train.windows) == ["B", "A"]
    assert data.weights == [3.0, 1.0]
    assert list(data.held_out) == ["A", "B", "forgetting"]
    facts = dict(data.train.facts())
    tokens = sum(len(ids) for ids in tokenizer.encode_documents(TEXTS))
    assert f"300 documents, 0.0 MB, {tokens:,} tokens in " in facts["data"]
    assert facts["components"].startswith("A 6")
    together = prepare(data_config(**given), tokenizer, 48).train
    assert list(together.windows) == [""]
    with pytest.raises(ValueError, match=r"data\.train: nothing to pack of C; there are A, B"):
        prepare(data_config(**given, weights={"C": 1.0}), tokenizer, 48)


@pytest.mark.parametrize(("train", "validation"), [("here", "gone"), ("gone", "here"), ([], "here")])
def test_prepare_looks_for_all_files_first(
    file: Path, cache: Path, tokenizer: Tokenizer, train: str | list[str], validation: str
) -> None:
    paths = {"here": str(file), "gone": f"{file}.gone"}
    given = {"train": paths[train] if isinstance(train, str) else train, "validation": paths[validation]}
    with pytest.raises(ValueError, match="^data.validation: no" if validation == "gone" else "^data.train"):
        prepare(data_config(**given, cache_dir=str(cache)), tokenizer, 48)
    assert not cache.exists()
