"""Token stores on disk: what tokenizing gives, a file each, written once, whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from text_data import VALUES, jsonl, text_data
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from gptj_train.atomic_write import SCRATCH_PATTERN
from gptj_train.config import EvaluationDataConfig
from gptj_train.data import claims, preparation, progress, store, workers
from gptj_train.data.corpus import prepare
from gptj_train.data.preparation import open_stores
from gptj_train.data.store import TokenStore
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError

DOCUMENTS = [f"Document {number}: " + "naïve words, 東京 🙂 " * (number % 7) for number in range(300)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "train.jsonl", *DOCUMENTS)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "cache"


@pytest.fixture
def opened(cache: Path, tokenizer: Tokenizer) -> Any:
    def open_them(*files: Path, tokenizer: Tokenizer = tokenizer, **changes: Any) -> list[TokenStore]:
        return open_stores(list(files), text_data(cache_dir=str(cache), **changes), tokenizer)

    return open_them


def folders(cache: Path) -> list[Path]:
    """Stores, also those that are not complete yet."""
    return sorted(path for path in cache.iterdir() if path.is_dir() and not path.name.startswith(("packed_", "locks")))


def contents(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for folder in folders(cache) for path in folder.iterdir()}


def times(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for folder in folders(cache) for path in folder.iterdir()}


# --- what a store holds ---


def test_tokens_are_those_of_the_documents(file: Path, opened: Any, tokenizer: Tokenizer) -> None:
    (made,) = opened(file)
    documents = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_texts(DOCUMENTS)]
    assert made.tokens.tolist() == [token for ids in documents for token in ids]
    assert made.ends.tolist() == np.cumsum([len(ids) for ids in documents]).tolist()
    assert made.bytes.tolist() == [len(text.encode()) for text in DOCUMENTS]
    assert set(made.components) == {0}
    assert made.names == ["train"]
    assert made.skipped == {}
    assert made.targets is None
    assert made.tokens.dtype == np.uint16
    assert not made.tokens.flags.writeable


def test_nothing_depends_on_how_much_is_tokenized_at_once(
    file: Path, cache: Path, opened: Any, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(file)
    monkeypatch.setattr(store, "_CHARACTERS_AT_ONCE", 100)
    open_stores([file], text_data(cache_dir=str(tmp_path / "other")), tokenizer)
    assert contents(tmp_path / "other") == contents(cache)


def test_examples_store_which_tokens_are_targets(tmp_path: Path, opened: Any, tokenizer: Tokenizer) -> None:
    pairs = [("Question: one?", " The answer is é."), ("<|endoftext|>", "<|endoftext|>")]
    records = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    (made,) = opened(jsonl(tmp_path / "qa.jsonl", *records), kind="completion")
    expected: list[tuple[int, bool]] = []
    for prompt, response in pairs:
        expected += [(token, False) for token in tokenizer.encode_texts([prompt])[0]]
        expected += [(token, True) for token in [*tokenizer.encode_texts([response])[0], tokenizer.eos_id]]
    assert list(zip(made.tokens.tolist(), made.targets.tolist(), strict=True)) == expected
    # What the data spell is text: the id that ends documents stands only at their ends.
    assert np.flatnonzero(made.tokens == tokenizer.eos_id).tolist() == (made.ends - 1).tolist()
    assert made.bytes.tolist() == [len((prompt + response).encode()) for prompt, response in pairs]


def test_a_template_may_contain_special_tokens_and_a_message_may_not(tmp_path: Path, opened: Any) -> None:
    messages = [{"role": "user", "content": "<|endoftext|>"}, {"role": "assistant", "content": "b"}]
    file = jsonl(tmp_path / "chat.jsonl", {"messages": messages})
    (made,) = opened(file, kind="chat", chat_template="{content}<|endoftext|>")
    ended = made.tokens == 0
    assert ended.sum() == 3
    assert made.targets[ended].tolist() == [False, True, True]
    assert made.targets.sum() == 3  # "b", how it ends, and the end of the document


def test_components_are_numbered_as_they_come(tmp_path: Path, opened: Any) -> None:
    names = ["b", "a", "b", None, "c"]
    records = [{"text": "x", "meta": {"pile_set_name": name}} for name in names]
    (made,) = opened(jsonl(tmp_path / "mixed.jsonl", *records))
    assert made.names == ["b", "a", "mixed", "c"]
    assert made.components.tolist() == [0, 1, 0, 2, 3]


@pytest.mark.parametrize("most", [2, 1])
def test_too_many_components(tmp_path: Path, opened: Any, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_MOST_COMPONENTS", most)
    file = jsonl(tmp_path / "a.jsonl", *({"text": "x", "id": name} for name in ("p", "q")))
    if most == 2:
        assert opened(file, component_field="id")[0].names == ["p", "q"]
    else:
        with pytest.raises(UserError, match=r"data\.component_field: more than 1 components; name another field"):
            opened(file, component_field="id")


@pytest.mark.parametrize(("largest", "dtype"), [(65535, np.uint16), (65536, np.uint32)])
def test_ids_are_as_wide_as_the_vocabulary_needs(file: Path, opened: Any, largest: int, dtype: type) -> None:
    words = {f"w{number}": number for number in range(1, largest + 1)}
    backend = Backend(models.WordLevel({"<|endoftext|>": 0, **words}, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    jsonl(file, f"w{largest} w1")
    (made,) = opened(file, tokenizer=Tokenizer(backend))
    assert made.tokens.dtype == dtype
    assert made.tokens.tolist() == [largest, 1, 0]


# --- what is made again, and what is not ---


def test_a_store_is_made_once(file: Path, cache: Path, opened: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    opened(file)
    (folder,) = folders(cache)
    assert {path.name for path in folder.iterdir()} == {"tokens.bin", "documents.bin", "store.json"}
    first = times(cache)
    other = jsonl(tmp_path / "other.jsonl", "another text")
    opened(file)
    opened(file, other, tokenizer=Tokenizer(tokenizer._backend))
    opened(file, packing="best_fit", isolate=False, weights={"train": 1.0}, bad_records="skip", max_bad_share=0.5)
    data = text_data(train=[str(other), str(file)], validation=str(file), cache_dir=str(cache))
    for length in (8, 64):
        prepare(data, tokenizer, length)
    assert len(folders(cache)) == 2
    assert {path: time for path, time in times(cache).items() if path.parent == folder} == first


def test_a_file_listed_twice_counts_twice_and_is_made_once(file: Path, cache: Path, opened: Any) -> None:
    stores = opened(file, file, file.parent / "." / file.name)
    assert [len(made.ends) for made in stores] == [300] * 3
    assert len(folders(cache)) == 1


def test_whatever_changes_the_tokens_makes_another_store(file: Path, cache: Path, opened: Any) -> None:
    record = {
        "text": "one",
        "body": "quite another text",
        "prompt": "p",
        "response": "r",
        "messages": [{"role": "assistant", "content": "c"}],
    }
    jsonl(file, record)
    opened(file)
    opened(file, tokenizer=Tokenizer.train(DOCUMENTS, 300))
    opened(file, text_field="body")
    opened(file, component_field="source")
    opened(file, kind="completion")
    opened(file, kind="completion", prompt_field="text")
    opened(file, kind="completion", response_field="text")
    opened(file, kind="chat")
    opened(file, kind="chat", chat_template="{role} {content}")
    jsonl(file, record, record)
    (after,) = opened(file)
    assert len(folders(cache)) == 10
    assert len(after.ends) == 2


def test_an_edit_that_keeps_the_size_is_seen(file: Path, opened: Any, tokenizer: Tokenizer) -> None:
    jsonl(file, "aaaa")
    os.utime(file, ns=(0, 0))
    opened(file)
    jsonl(file, "bbbb")
    (edited,) = opened(file)
    assert tokenizer.decode(edited.tokens.tolist()) == "bbbb"


# --- bad records ---


@pytest.mark.parametrize("spoilt", ['{"text": ""}\n', "broken\n"])
def test_an_error_leaves_no_folder(file: Path, cache: Path, opened: Any, spoilt: str) -> None:
    good = file.read_text()
    file.write_text(good + spoilt)
    for _ in range(2):
        with pytest.raises(UserError, match=r"train\.jsonl:301: "):
            opened(file)
        assert folders(cache) == []
    file.write_text(good)
    assert len(opened(file)[0].ends) == 300


@pytest.mark.parametrize("content", ["", "\n", "\n  \n\n"])
def test_no_text_at_all(file: Path, opened: Any, content: str) -> None:
    file.write_text(content)
    with pytest.raises(UserError, match=r"train\.jsonl: the data contain no text"):
        opened(file)


def test_an_empty_file_beside_others_has_no_documents(file: Path, opened: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    empty, made = opened(tmp_path / "empty.jsonl", file)
    assert len(empty.ends) == len(empty.tokens) == 0
    assert len(made.ends) == 300


def test_bad_records_are_skipped_up_to_a_share(file: Path, opened: Any, tmp_path: Path) -> None:
    with file.open("a") as lines:
        lines.write('broken\n{"text": 5}\nbroken too\n')
    other = jsonl(tmp_path / "other.jsonl", "x", "y")
    made, _ = opened(file, other, bad_records="skip", max_bad_share=3 / 305)
    assert made.skipped == {"not a line of JSON": 2, "no text in field 'text'": 1}
    assert len(made.ends) == 300
    with pytest.raises(UserError, match=r"\S") as caught:
        opened(file, other, bad_records="skip", max_bad_share=0.0098)
    assert str(caught.value) == (
        f"{file}, {other}: 0.98% of the records are bad (2 x not a line of JSON, 1 x no text in field 'text'), "
        "more than data.max_bad_share (0.98%); data.bad_records=error names the first of them"
    )


def test_a_file_of_nothing_but_bad_records_is_not_called_empty(file: Path, opened: Any) -> None:
    file.write_text("broken\n")
    with pytest.raises(UserError, match=r"100\.00% of the records are bad \(1 x not a line of JSON\)"):
        opened(file, bad_records="skip")


def test_a_store_that_skipped_records_is_not_used_for_error(file: Path, cache: Path, opened: Any) -> None:
    good = file.read_text()
    file.write_text(good + "broken\n")
    opened(file, bad_records="skip")
    with pytest.raises(UserError, match=r"train\.jsonl:301: not a line of JSON"):
        opened(file)
    assert len(opened(file, bad_records="skip")[0].ends) == 300  # which is still there
    assert len(folders(cache)) == 1


def test_a_cache_that_cannot_be_written(file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    data = text_data(cache_dir=str(tmp_path / "taken" / "cache"))
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write into .*/taken/cache \(Not a directory\); free"):
        open_stores([file], data, tokenizer)


# --- several processes ---


def forked(target: Callable[[Connection], None]) -> tuple[BaseProcess, Connection]:
    """Start a copy of this process, which need not import torch again, and a connection to it."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs,))
    process.start()
    return process, ours


def kill_self(*_: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_two_processes_at_once(file: Path, cache: Path, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, batches = store._encode, []
    monkeypatch.setattr(store, "_CHARACTERS_AT_ONCE", 2000)
    monkeypatch.setattr(store, "_encode", lambda *given: batches.append(1) or encode(*given))

    def prepare_on_signal(connection: Connection) -> None:
        connection.send("ready")
        connection.recv()
        opened(file)
        connection.send(len(batches))

    twins = [forked(prepare_on_signal) for _ in range(2)]
    assert [connection.recv() for _, connection in twins] == ["ready"] * 2
    for _, connection in twins:
        connection.send("go")
    encoded = sorted(connection.recv() for _, connection in twins if connection.poll(60))
    for process, _ in twins:
        process.join(60)
    assert [process.exitcode for process, _ in twins] == [0, 0]
    assert encoded[0] == 0  # one waited, and had nothing left to do
    assert encoded[1] > 3
    before = times(cache)
    assert len(opened(file)[0].ends) == 300
    assert times(cache) == before


@pytest.mark.parametrize("moment", ["batch 2", "batch 5", "rename"])
def test_killed_at_any_time_and_run_again(
    file: Path, cache: Path, opened: Any, tokenizer: Tokenizer, tmp_path: Path, moment: str
) -> None:
    open_stores([file], text_data(cache_dir=str(tmp_path / "straight")), tokenizer)

    def die(_: Connection) -> None:
        store._CHARACTERS_AT_ONCE = 2000  # of the copy of this process
        if moment == "rename":
            Path.rename = kill_self
        else:
            encode, batches = store._encode, iter(range(1, 1000))
            last = int(moment.split()[1])
            store._encode = lambda *given: kill_self() if next(batches) == last else encode(*given)
        opened(file)

    process, _ = forked(die)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (leftover,) = folders(cache)
    assert leftover.match(SCRATCH_PATTERN)
    assert (leftover / "tokens.bin").exists()
    opened(file)
    assert contents(cache) == contents(tmp_path / "straight")
    assert len(folders(cache)) == 1


@pytest.fixture
def several(tmp_path: Path) -> list[Path]:
    return [jsonl(tmp_path / f"{name}.jsonl", *DOCUMENTS[number::3]) for number, name in enumerate("abc")]


def test_workers_make_the_same_stores(
    several: list[Path], cache: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", cache
    open_stores(several, text_data(cache_dir=str(here)), tokenizer)
    monkeypatch.setattr(preparation, "_SMALL", 0)
    monkeypatch.setattr(preparation, "tokenize_file", None)  # not in this process
    # A recipe's own config, that knows more than where the text is.
    known = VALUES | {"train": None, "validation": "x", "second_text_field": None, "label_field": "label"}
    stores = open_stores(several, EvaluationDataConfig(**known | {"cache_dir": str(there)}), tokenizer)
    assert [len(made.ends) for made in stores] == [100] * 3
    assert contents(there) == contents(here)
    assert len(folders(there)) == 3


@pytest.mark.parametrize("small", [preparation._SMALL, 0])  # in this process, or by workers
def test_hosts_share_the_files(
    several: list[Path], cache: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    """Two processes that take each other for another host: each file is tokenized once, by one of them."""
    files = [*several, *(jsonl(tmp_path / f"{name}.jsonl", *DOCUMENTS[::2]) for name in "defgh")]
    data = text_data(cache_dir=str(cache))
    monkeypatch.setattr(preparation, "_SMALL", small)
    monkeypatch.setattr(preparation, "_POLL", 0.05)
    make = preparation.new_folder if small else workers.new_folder
    made: list[str] = []

    def counted(folder: Path) -> Any:
        made.append(folder.name)
        time.sleep(0.2)  # so that the other one gets some too
        return make(folder)

    monkeypatch.setattr(preparation, "new_folder", counted)
    monkeypatch.setattr(workers, "new_folder", counted)

    def prepare_as(host: str) -> Callable[[Connection], None]:
        def run(connection: Connection) -> None:
            claims.socket.gethostname = lambda: host
            connection.send("ready")
            connection.recv()
            connection.send([len(one) for one in open_stores(files, data, tokenizer)])
            connection.send(made)

        return run

    hosts = [forked(prepare_as(host)) for host in ("one", "two")]
    assert [connection.recv() for _, connection in hosts] == ["ready"] * 2
    for _, connection in hosts:
        connection.send("go")
    assert [connection.recv() for _, connection in hosts] == [[100] * 3 + [150] * 5] * 2
    shares = [connection.recv() for _, connection in hosts]
    assert all(shares)
    for process, _ in hosts:
        process.join(60)
    assert sorted(name for share in shares for name in share) == [folder.name for folder in folders(cache)]
    open_stores(files, text_data(cache_dir=str(tmp_path / "alone")), tokenizer)
    assert contents(cache) == contents(tmp_path / "alone")


def test_what_a_killed_host_left_is_removed_and_what_another_host_writes_is_not(
    file: Path, cache: Path, opened: Any
) -> None:
    left, live = cache / ".left.0000.tmp", cache / ".live.0000.tmp"
    for folder in (left, live):
        folder.mkdir(parents=True)
    with claims.lock_of(cache / "live"):
        opened(file)
        assert (left.exists(), live.exists()) == (False, True)


def test_a_bad_record_in_a_worker_is_one_error(
    several: list[Path], cache: Path, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "_SMALL", 0)
    with several[1].open("a") as lines:
        lines.write('{"text": "no end"\n' + '{"text": "x"}\n' * 10_000)
    with pytest.raises(UserError, match=r"b\.jsonl:101: not a line of JSON; each line must be one record") as caught:
        opened(*several)
    assert "\n" not in str(caught.value)
    assert [folder.name for folder in folders(cache) if not TokenStore.exists(folder)] == []
    assert len(folders(cache)) < 3


def test_a_worker_that_dies_is_an_error(
    several: list[Path], cache: Path, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "_SMALL", 0)
    monkeypatch.setattr(workers.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="a worker that prepares data ended with exit code 1"):
        opened(*several)
    assert folders(cache) == []


def test_progress_is_a_line_now_and_then(
    file: Path, opened: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(file)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0)
    opened(file, text_field="text", component_field="other")
    out, err = capsys.readouterr()
    assert out.startswith("preparing data: 100% of 0.00 GB, ")
    assert err == ""


def test_the_metadata_of_a_store(file: Path, cache: Path, opened: Any) -> None:
    opened(file)
    metadata = json.loads((folders(cache)[0] / "store.json").read_text())
    sizes = {path.name: path.stat().st_size for path in folders(cache)[0].glob("*.bin")}
    counts = {"skipped": {}, "special_tokens": {}}
    assert metadata == {"dtype": "uint16", "components": ["train"], **counts, "bytes": sizes}


DAMAGED_STORES = {
    "cut tokens": ("tokens.bin", lambda data: data[:-3], "tokens.bin has "),
    "cut documents": ("documents.bin", lambda data: data[:-3], "documents.bin has "),
    "cut metadata": ("store.json", lambda data: data[:-3], "its store.json is damaged"),
    "no tokens": ("tokens.bin", None, "tokens.bin: No such file or directory"),
    "no documents": ("documents.bin", None, "documents.bin: No such file or directory"),
    "no metadata": ("store.json", None, "store.json: No such file or directory"),
    "another dtype": ("store.json", lambda data: data.replace(b"uint16", b"int16"), "its store.json is damaged"),
    "a key less": ("store.json", lambda data: data.replace(b"skipped", b"skippe"), "its store.json is damaged"),
    "a negative count": (
        "store.json",
        lambda data: data.replace(b'"skipped": {', b'"skipped": {"a": -1'),
        "its store.json",
    ),
    "no list": ("store.json", lambda data: data.replace(b'["train"]', b'"train"'), "its store.json is damaged"),
    "nesting": ("store.json", lambda data: b"[" * 100_000, "its store.json is damaged"),
}


@pytest.mark.parametrize(("name", "change", "said"), DAMAGED_STORES.values(), ids=DAMAGED_STORES)
def test_a_damaged_store_is_named_and_made_again(
    file: Path,
    cache: Path,
    opened: Any,
    name: str,
    change: Callable[[bytes], bytes] | None,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a cluster's clearing of old files leaves it. To read beyond a mapped file's end would kill the process."""
    (whole,) = opened(file)
    expected = whole.tokens.tolist()
    capsys.readouterr()
    path = folders(cache)[0] / name
    if change is None:
        path.unlink()
    else:
        changed = change(path.read_bytes())
        assert changed != path.read_bytes()
        path.write_bytes(changed)
    folder = folders(cache)[0]
    (again,) = opened(file)
    assert again.tokens.tolist() == expected
    line = next(line for line in capsys.readouterr().err.splitlines() if "damaged" in line)
    assert line.startswith(f"{folder}: damaged, {said}")
    assert line.endswith("; it is made again")
