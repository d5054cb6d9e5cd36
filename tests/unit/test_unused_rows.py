"""Unused embedding rows: named in every export, given to added tokens, the last one kept for padding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_tokenizer import gpt2_folder
from transformers import AutoTokenizer

from gptj_train.data.tokenizer import Tokenizer
from gptj_train.data.unused_rows import AddedToken
from gptj_train.errors import UserError

ROWS = 300


@pytest.fixture
def gpt2(tmp_path: Path) -> Tokenizer:
    """267 entries, the EOS token last, as in GPT-2."""
    return Tokenizer.load(gpt2_folder(tmp_path))


def test_every_row_has_an_entry_in_the_saved_folder(gpt2: Tokenizer, tmp_path: Path) -> None:
    gpt2.save(tmp_path, ROWS)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ROWS
    assert theirs.convert_ids_to_tokens([267, 268, 299]) == [f"<|extratoken_{n}|>" for n in (1, 2, 33)]
    assert (theirs.pad_token, theirs.pad_token_id) == ("<|extratoken_33|>", 299)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (266, 266)
    ours = Tokenizer.load(tmp_path)
    assert (len(ours), ours.largest_id, ours.pad_id(ROWS)) == (ROWS, 299, 299)
    assert len(gpt2) == 267  # the tokenizer itself is as it was


def test_saving_again_changes_nothing(gpt2: Tokenizer, tmp_path: Path) -> None:
    gpt2.save(tmp_path, ROWS)
    once = Tokenizer.load(tmp_path)
    (tmp_path / "again").mkdir()
    once.save(tmp_path / "again", ROWS)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_text() == (tmp_path / "again" / name).read_text()


def test_names_of_rows_change_no_text(gpt2: Tokenizer, tmp_path: Path) -> None:
    gpt2.save(tmp_path, ROWS)
    full = Tokenizer.load(tmp_path)
    texts = ["hello world", "<|extratoken_1|> is only text here", "hell<|endoftext|>"]
    assert full.encode_texts(texts) == gpt2.encode_texts(texts)


def test_gpt_j_names_143_rows(tmp_path: Path) -> None:
    """50257 tokens leave 143 of 50400 rows unused."""
    tokenizer = Tokenizer.load(gpt2_folder(tmp_path))
    backend = json.loads(tokenizer._backend.to_str())
    backend["model"]["vocab"] |= {f"word{n}": n for n in range(267, 50257)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    Tokenizer.load(tmp_path).save(tmp_path, 50400)
    full = Tokenizer.load(tmp_path)
    assert len(full) == 50400
    assert [full.encode(f"<|extratoken_{n}|>") for n in (1, 143)] == [[50257], [50399]]


def test_added_tokens_take_the_first_unused_rows(gpt2: Tokenizer, tmp_path: Path) -> None:
    tokens = [AddedToken("<|user|>", ("hello", "world")), AddedToken("<|bot|>")]
    more, means = gpt2.with_added_tokens(tokens, ROWS)
    assert means == {267: [*gpt2.encode("hello"), *gpt2.encode("world")]}
    (ids,) = more.encode_texts(["<|user|>hello<|bot|>"])
    assert ids == [267, *gpt2.encode("hello"), 268]
    assert more.decode(ids) == "<|user|>hello<|bot|>"
    assert more.bytes_per_token[267] == len("<|user|>")
    more.save(tmp_path, ROWS)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("<|user|>hello<|bot|>")["input_ids"] == ids
    assert theirs.convert_ids_to_tokens(269) == "<|extratoken_3|>"  # the others keep their names
    assert (len(theirs), theirs.pad_token_id) == (ROWS, 299)


def test_tokens_that_exist_keep_their_rows(gpt2: Tokenizer, tmp_path: Path) -> None:
    """Training an export with the same add_tokens neither renames nor initializes its rows again."""
    tokens = [AddedToken("<|user|>", ("hello",))]
    gpt2.with_added_tokens(tokens, ROWS)[0].save(tmp_path, ROWS)
    again = Tokenizer.load(tmp_path)
    more, means = again.with_added_tokens([*tokens, AddedToken("<|bot|>", ("hello",))], ROWS)
    assert means == {268: gpt2.encode("hello")}
    assert [more.encode(word) for word in ("<|user|>", "<|bot|>")] == [[267], [268]]
    assert again.with_added_tokens(tokens, ROWS)[0].digest == again.digest


def test_one_row_stays_for_padding(gpt2: Tokenizer) -> None:
    tokens = [AddedToken(f"<|{n}|>") for n in range(33)]
    full, _ = gpt2.with_added_tokens(tokens[:32], ROWS)
    assert full.pad_id(ROWS) == 299
    with pytest.raises(UserError, match="33 new tokens, but the vocabulary of 300 has 32 unused rows"):
        gpt2.with_added_tokens(tokens, ROWS)
    with pytest.raises(UserError, match="1 new token, but the vocabulary of 267 has 0 unused rows"):
        gpt2.with_added_tokens(tokens[:1], 267)
    assert gpt2.pad_id(267) == gpt2.eos_id


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("<|user|>", AddedToken("<|user|>")),
        ("<|user|> = user person", AddedToken("<|user|>", ("user", "person"))),
        ("a=b", AddedToken("a=b")),
    ],
)
def test_parse(text: str, word: AddedToken) -> None:
    assert AddedToken.parse(text) == word


@pytest.mark.parametrize("text", ["", " ", " = user"])
def test_a_token_without_a_name(text: str) -> None:
    with pytest.raises(UserError, match="has no name"):
        AddedToken.parse(text)
