"""A share of the training data is held out by document: exact, the same everywhere, and no document on both sides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_data import jsonl, text_data

from gptj_train.data.corpus import Split, TextData, prepare
from gptj_train.data.held_out_share import HeldOutShare
from gptj_train.data.labelled import LabelledDataConfig, LabelledRows, prepare_labelled
from gptj_train.data.squad import QADataConfig, read_questions
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError

NO_DATASET: dict[str, Any] = dict.fromkeys(("dataset", "subset", "split", "validation_split", "revision"))
TEXTS = [f"number {number}" for number in range(200)]


def prepared(folder: Path, tokenizer: Tokenizer, held_out: HeldOutShare, **changes: Any) -> TextData:
    if "train" not in changes:
        changes["train"] = str(jsonl(folder / "train.jsonl", *TEXTS))
    return prepare(text_data(cache_dir=str(folder / "cache"), **changes), tokenizer, 256, held_out)


def texts_of(split: Split, tokenizer: Tokenizer) -> list[str]:
    """Decode every document of a split; windows in a row hold them one after the other, each with its end."""
    found = []
    for windows in split.windows.values():
        ids: list[int] = []
        for index in range(len(windows)):
            window = windows[index]
            ids += window.tokens[window.document_ids > 0].tolist()
        found += tokenizer.decode_all(ids).split("<|endoftext|>")[:-1]
    return sorted(found)


def test_every_document_is_on_one_side(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    data = prepared(tmp_path, tokenizer, HeldOutShare(0.02, seed=1))
    train, held = texts_of(data.splits["train"], tokenizer), texts_of(data.splits["validation"], tokenizer)
    assert len(held) == 4
    assert sorted(train + held) == sorted(TEXTS)
    said = "held out: 4 of 200 documents of data.train, 2.0% (validation_share=0.02, seed=1)\n"
    assert said in capsys.readouterr().out
    assert list(data.held_out) == ["train"]


def test_share_and_seed_reuse_the_stores(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sides = []
    train = str(jsonl(tmp_path / "train.jsonl", *TEXTS))
    for share, seed in ((0.1, 0), (0.1, 0), (0.1, 1), (0.5, 0)):
        data = prepared(tmp_path, tokenizer, HeldOutShare(share, seed), train=train)
        sides.append(set(texts_of(data.splits["validation"], tokenizer)))
    first, again, other_seed, larger = sides
    assert first == again
    assert len(first & other_seed) < 10
    assert first < larger
    assert len(list((tmp_path / "cache").glob("*/store.json"))) == 1


def test_copies_share_a_side_in_any_order_of_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    a = str(jsonl(tmp_path / "a.jsonl", *TEXTS[:120]))
    b = str(jsonl(tmp_path / "b.jsonl", *TEXTS[80:]))
    sides = []
    for files in ([a, b], [b, a]):
        data = prepared(tmp_path, tokenizer, HeldOutShare(0.3), train=files)
        held = texts_of(data.splits["validation"], tokenizer)
        assert not set(held) & set(texts_of(data.splits["train"], tokenizer))
        assert len(set(held)) == 60
        sides.append(held)
    assert sides[0] == sides[1]
    assert len(sides[0]) > 60  # some of the copies


def test_another_process_holds_out_the_same(tmp_path: Path) -> None:
    """Ranks decide on their own: Python's hash(), which differs between processes, must not take part."""
    code = (
        "from gptj_train.data.held_out_share import HeldOutShare as H; "
        "print(H(0.1, 7).divide([str(n) for n in range(50)], lambda text: text, 'text')[1])"
    )
    _, held = HeldOutShare(0.1, 7).divide([str(number) for number in range(50)], lambda text: text, "text")
    assert len(held) == 5
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == str(held)


def test_draws_are_uniform() -> None:
    """Neighbouring seeds and hashes give independent sides: each document is held out in its share of the seeds."""
    hashes = np.arange(100, dtype=np.uint64)
    counts = np.zeros(100)
    for seed in range(500):
        counts += HeldOutShare(0.2, seed).split(hashes)
    # Binomial with mean 100 and standard deviation 9.
    assert 60 < counts.min() <= counts.max() < 140
    assert counts.sum() == 500 * 20


def test_components_of_a_mixture(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [
        {"text": f"{name} {number}", "meta": {"pile_set_name": name}}
        for number in range(60)
        for name in ("A", "B", "C")
    ]
    train = str(jsonl(tmp_path / "mixed.jsonl", *records))
    data = prepared(tmp_path, tokenizer, HeldOutShare(0.5), train=train, weights={"B": 1, "A": 2})
    assert list(data.held_out) == ["B", "A"]
    for name in "AB":
        held = data.held_out[name].facts.documents
        assert held + data.train.windows[name].facts.documents == 60
        assert 15 < held < 45


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_examples(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    records = {
        "completion": [{"prompt": f"q{number} ", "response": "yes"} for number in range(40)],
        "chat": [
            {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "yes"}]}
            for number in range(40)
        ],
    }[kind]
    train = str(jsonl(tmp_path / "examples.jsonl", *records))
    data = prepared(tmp_path, tokenizer, HeldOutShare(0.25), train=train, kind="auto")
    train_texts, held = (texts_of(data.splits[name], tokenizer) for name in ("train", "validation"))
    assert (len(train_texts), len(held)) == (30, 10)
    assert not set(train_texts) & set(held)
    (windows,) = data.held_out.values()
    assert 0 < windows[0].targets.sum() < 100  # the prompts are no targets here either


def labelled(folder: Path, tokenizer: Tokenizer, held_out: HeldOutShare, **changes: Any) -> Any:
    rows = [{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(TEXTS + TEXTS[:50])]
    rows.append({"text": "the only one of its kind", "label": "rare"})
    fields = {"validation": None, "text_field": "text", "second_text_field": None, "label_field": "label"}
    fields |= NO_DATASET | {"bad_records": "error", "max_bad_share": 0.01} | changes
    data = LabelledDataConfig(train=str(jsonl(folder / "rows.jsonl", *rows)), **fields)
    return prepare_labelled(
        data,
        problem_type="single_label_classification",
        labels=None,
        tokenizer=tokenizer,
        length=64,
        held_out=held_out,
    )


def test_labelled_texts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def texts(rows: LabelledRows) -> set[str]:
        return {tokenizer.decode(ids.tolist()) for ids in rows.token_ids}

    train, validation, names = labelled(tmp_path, tokenizer, HeldOutShare(0.9))
    assert names == ["a", "b", "rare"]  # known, whichever side it falls on
    assert len(texts(validation)) == 181
    assert len(texts(train)) == 20
    assert not texts(train) & texts(validation)
    assert len(train) + len(validation) == 251


def test_questions_share_the_side_of_their_context(tmp_path: Path) -> None:
    records = [
        {"id": f"{context}-{number}", "question": "What?", "context": f"It is {context}.", "answers": str(context)}
        for context in range(10, 30)
        for number in range(3)
    ]
    train_file = str(jsonl(tmp_path / "qa.jsonl", *records))
    data = QADataConfig(train=train_file, validation=None, bad_records="error", max_bad_share=0.01, **NO_DATASET)
    train, held = read_questions(data, HeldOutShare(0.2))
    assert len({question.context for question in held}) == 4
    assert len(held) == 12
    assert not {question.context for question in held} & {question.context for question in train}


def test_a_share_beside_files_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    match = r"validation_share=0\.1 and data\.validation=x\.jsonl both say what is held out"
    with pytest.raises(UserError, match=match):
        prepared(tmp_path, tokenizer, HeldOutShare(0.1), validation="x.jsonl")
    with pytest.raises(UserError, match=match):
        labelled(tmp_path, tokenizer, HeldOutShare(0.1), validation="x.jsonl")
    data = QADataConfig(train="none.jsonl", validation="x.jsonl", bad_records="error", max_bad_share=0.01, **NO_DATASET)
    with pytest.raises(UserError, match=match):
        read_questions(data, HeldOutShare(0.1))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 5.0])
def test_what_is_no_share(share: float) -> None:
    with pytest.raises(UserError, match="validation_share must be above 0 and below 1"):
        HeldOutShare(share)


def test_one_document_cannot_be_divided(tmp_path: Path, tokenizer: Tokenizer) -> None:
    book = tmp_path / "book.txt"
    book.write_text("A long story. " * 50)
    with pytest.raises(UserError, match=r"a \.txt file is one document.*data\.validation=FILE"):
        prepared(tmp_path, tokenizer, HeldOutShare(0.1), train=str(book))


def test_a_small_share_holds_out_at_least_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train = str(jsonl(tmp_path / "two.jsonl", "one text", "another text"))
    for share in (0.001, 0.999):
        data = prepared(tmp_path, tokenizer, HeldOutShare(share), train=train)
        assert [len(texts_of(data.splits[name], tokenizer)) for name in ("train", "validation")] == [1, 1]


def test_without_held_out_data_a_line_warns(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(tmp_path, tokenizer, HeldOutShare())
    said = capsys.readouterr().out
    assert said.count("no data.validation: nothing will show over-fitting") == 1
    prepared(tmp_path, tokenizer, HeldOutShare(0.1), train=str(tmp_path / "train.jsonl"))
    assert "over-fitting" not in capsys.readouterr().out
