"""Tokenizer folders as the hub has them: every file counts, with the ids of Transformers, and nothing is invented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer import gpt2_folder
from transformers import AutoTokenizer, GPT2Tokenizer

from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError

BOM = "\ufeff"


def write(folder: Path, **files: Any) -> Path:
    """JSON files by name without suffix."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def with_vocabulary(folder: Path, *tokens: str, without: str = "<|endoftext|>") -> Path:
    """The two files of GPT-2, with other tokens in the place of the last."""
    gpt2_folder(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    del vocabulary[without]
    for token in tokens:
        vocabulary[token] = len(vocabulary)
    return write(folder, vocab=vocabulary)


@pytest.fixture
def fast(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A folder with tokenizer.json alone: 340 entries, <|endoftext|> 0, </s> 340, <|user|> 341."""
    tokenizer.save(tmp_path)
    backend = Tokenizer.load(tmp_path)._backend
    backend.add_special_tokens(["</s>", "<|user|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    return tmp_path


def test_added_tokens_of_a_slow_tokenizer_keep_their_ids(tmp_path: Path) -> None:
    write(
        gpt2_folder(tmp_path),
        added_tokens={"<|user|>": 267, "<|bot|>": 268},
        tokenizer_config={"eos_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer"},
    )
    ours, theirs = Tokenizer.load(tmp_path), GPT2Tokenizer.from_pretrained(tmp_path)
    assert ours.encode("<|user|>a<|bot|>")[::2] == [267, 268]
    for text in ("<|user|>hello world<|bot|>", "a <|bot|> b<|endoftext|>"):
        assert ours.encode(text) == theirs(text)["input_ids"]
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved", 300)
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.convert_ids_to_tokens([266, 267, 268, 269]) == [
        "<|endoftext|>",
        "<|user|>",
        "<|bot|>",
        "<|extratoken_1|>",
    ]


def test_added_tokens_with_a_gap_before_them(tmp_path: Path) -> None:
    write(gpt2_folder(tmp_path), added_tokens={"<|user|>": 290, "<|bot|>": 280})
    ours = Tokenizer.load(tmp_path)
    assert ours.encode("<|user|>a<|bot|>")[::2] == [290, 280]
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved", 300)
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(again) == 300
    assert (again("<|user|>")["input_ids"], again("<|bot|>")["input_ids"]) == ([290], [280])
    assert Tokenizer.load(tmp_path / "saved").encode("hello <|user|>") == ours.encode("hello <|user|>")


NAMES = {
    "tokenizer_config.json": {"tokenizer_config": {"eos_token": "</s>"}},
    "special_tokens_map.json": {"special_tokens_map": {"eos_token": "</s>"}},
    "a dictionary": {"special_tokens_map": {"eos_token": {"content": "</s>", "lstrip": False}}},
    "the map before the config": {
        "tokenizer_config": {"eos_token": "<|user|>"},
        "special_tokens_map": {"eos_token": "</s>"},
    },
    "the config with a decoder before the map": {
        "tokenizer_config": {
            "eos_token": "</s>",
            "added_tokens_decoder": {"340": {"content": "</s>", "special": True}},
        },
        "special_tokens_map": {"eos_token": "<|user|>"},
    },
}


@pytest.mark.parametrize("files", NAMES.values(), ids=NAMES)
def test_the_end_of_text_may_be_named_in_any_file(fast: Path, files: dict[str, Any]) -> None:
    write(fast, **files)
    loaded = Tokenizer.load(fast)
    assert (loaded.eos_token, loaded.eos_id) == ("</s>", 340)


def test_a_folder_that_names_no_end_of_text_has_that_of_gpt2(fast: Path) -> None:
    assert Tokenizer.load(fast).eos_id == 0


@pytest.mark.parametrize("files", NAMES.values(), ids=NAMES)
def test_a_slow_tokenizer_with_another_end_of_text(tmp_path: Path, files: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(files).replace('"340"', '"266"'))
    loaded = Tokenizer.load(write(with_vocabulary(tmp_path, "</s>", "<|user|>"), **changed))
    assert (loaded.eos_token, loaded.eos_id, len(loaded)) == ("</s>", 266, 268)
    assert loaded.encode("a</s>")[-1] == 266
    assert 266 not in loaded.encode_texts(["a</s>"])[0]


def test_no_end_of_text_is_invented(tmp_path: Path) -> None:
    with_vocabulary(tmp_path, "</s>")
    with pytest.raises(UserError, match=r"has no '<\|endoftext\|>' token to end documents with"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match=r"has no '<eos>' token to end documents with"):
        Tokenizer.load(write(tmp_path, special_tokens_map={"eos_token": "<eos>"}))


def test_byte_order_marks_and_windows_line_ends(fast: Path, tmp_path: Path) -> None:
    plain = Tokenizer.load(write(fast, tokenizer_config={"eos_token": "</s>"}))
    for file in fast.glob("*.json"):
        file.write_text(BOM + file.read_text(encoding="utf-8"), encoding="utf-8")
    assert Tokenizer.load(fast).digest == plain.digest
    slow = tmp_path / "slow"
    slow.mkdir()
    plain = Tokenizer.load(gpt2_folder(slow))
    for name in ("vocab.json", "merges.txt"):
        text = (slow / name).read_text(encoding="utf-8")
        (slow / name).write_text(BOM + text, encoding="utf-8", newline="\r\n")
    assert Tokenizer.load(slow).digest == plain.digest


def test_a_hole_in_the_vocabulary_is_an_extra_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = description["model"]["vocab"]
    description["model"]["merges"].pop()  # of the last entry, which goes
    description["model"]["vocab"] = {token: number for token, number in vocabulary.items() if number != 339}
    (hole,) = {number for token, number in vocabulary.items() if token == "Ā"}  # the byte 0
    del description["model"]["vocab"]["Ā"]
    write(tmp_path, tokenizer=description)
    ours = Tokenizer.load(tmp_path)
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved", 345)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(theirs) == 345
    assert theirs.convert_ids_to_tokens([hole, 339, 344]) == [f"<|extratoken_{n}|>" for n in (1, 2, 7)]
    assert theirs.pad_token_id == ours.pad_id(345) == 344
    text = "Hello, the quick fox"
    assert Tokenizer.load(tmp_path / "saved").encode(text) == ours.encode(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<|user|>": 5}}, r"'<\|user\|>' and '.' both have the id 5"),
        ({"added_tokens": {"<|user|>": "x"}}, r"added_tokens.json: 'x' is no token id"),
        ({"added_tokens": ["<|user|>"]}, r"added_tokens.json is not a JSON object"),
    ],
)
def test_files_that_contradict_are_refused(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tokenizer.load(write(gpt2_folder(tmp_path), **files))
