"""The tokenizer against Transformers' on the same files, and its bookkeeping of bytes and special tokens."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer

from gptj_train.data.tokenizer import EOS_TOKEN, Tokenizer
from gptj_train.errors import UserError

TRICKY = [
    "Hello, my dog is cute",
    " leading space",
    "   many   spaces   ",
    "line\nbreak\n\n\ntabs\t\tand\r\nwindows\r\n",
    "naïve café Grüße",
    "東京 Ελλάδα русский עברית العربية",
    "🙂👩‍👩‍👧🏳️‍🌈",
    "e\u0301 combining, \u00a0 no-break, \u200b zero width, \ufeff mark",
    "don't we'll I'M 12345 3.14e-10 __init__(self)->None:",
    "\x00\x01\x7f control",
    "a",
    "",
]


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path


def test_trained_size_and_eos_token(tokenizer: Tokenizer) -> None:
    assert len(tokenizer) == 340
    assert tokenizer.largest_id == 339
    assert (tokenizer.eos_token, tokenizer.eos_id) == ("<|endoftext|>", 0)


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, folder: Path) -> None:
    for path in (folder, folder / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.digest == tokenizer.digest
        assert loaded.encode_documents(TRICKY) == tokenizer.encode_documents(TRICKY)


@pytest.mark.parametrize("text", TRICKY)
def test_equals_transformers(folder: Path, text: str) -> None:
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids) == text


def test_transformers_knows_the_special_tokens(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id) == (0, 0, 0)
    assert len(theirs) == 340
    assert theirs("a<|endoftext|>")["input_ids"][-1] == 0


def test_documents_end_with_the_eos_token(tokenizer: Tokenizer) -> None:
    for text, ids in zip(TRICKY, tokenizer.encode_documents(TRICKY), strict=True):
        assert ids == [*tokenizer.encode(text), 0]


def test_text_that_spells_the_eos_token_is_plain_text(tokenizer: Tokenizer) -> None:
    text = "before<|endoftext|>after <|endoftext|>"
    (ids,) = tokenizer.encode_documents([text])
    assert ids.count(0) == 1
    assert tokenizer.decode(ids[:-1]) == text
    # A prompt may ask for the token itself.
    assert tokenizer.encode("before<|endoftext|>after").count(0) == 1


def test_encoding_prompts_and_documents_in_turn(tokenizer: Tokenizer) -> None:
    digest = tokenizer.digest
    for _ in range(2):
        assert tokenizer.encode_documents(["<|endoftext|>"])[0].count(0) == 1
        assert tokenizer.encode("<|endoftext|>") == [0]
        assert tokenizer.digest == digest


def test_saving_does_not_keep_that_special_tokens_are_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.encode_documents(["x"])
    tokenizer.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("<|endoftext|>")["input_ids"] == [0]


@pytest.mark.parametrize("text", TRICKY)
def test_bytes_of_tokens_add_up(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode_documents([text + "<|endoftext|>"])
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode()) + len(EOS_TOKEN)
    assert tokenizer.bytes_per_token.shape == (340,)
    assert tokenizer.bytes_per_token[0] == 0


def test_bytes_of_added_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["<|extratoken_1|>", "日本"])
    extended = Tokenizer(backend)
    (ids,) = extended.encode_documents(["a<|extratoken_1|>日本"])
    assert ids[-3:] == [340, 341, 0]
    assert extended.bytes_per_token[ids].tolist() == [1, len("<|extratoken_1|>"), 6, 0]


def gpt2_folder(folder: Path) -> Path:
    """A tiny vocabulary in GPT-2's two files; the EOS token is last, as in GPT-2."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "Ċ Ċ"]
    pieces = [*alphabet, *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


def test_vocab_and_merges_equal_transformers_gpt2(tmp_path: Path) -> None:
    folder = gpt2_folder(tmp_path)
    ours, theirs = Tokenizer.load(folder), GPT2Tokenizer.from_pretrained(folder)
    assert ours.eos_id == theirs.eos_token_id == 266
    assert len(ours) == len(theirs) == 267
    for text in [*TRICKY, "hello world\n\nhell low world"]:
        assert ours.encode(text) == theirs(text)["input_ids"]
    assert len(ours.encode("hello world\n\n")) == 3


def test_tokenizer_json_wins_over_vocab_and_merges(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(gpt2_folder(tmp_path))
    assert len(Tokenizer.load(tmp_path)) == 340


def test_documents_are_neither_truncated_nor_padded(folder: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded, plain = Tokenizer.load(tmp_path), Tokenizer.load(folder)
    assert loaded.encode_documents(TRICKY) == plain.encode_documents(TRICKY)
    assert loaded.digest == plain.digest


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "special": True}])
def test_the_eos_token_is_that_of_tokenizer_config(folder: Path, tmp_path: Path, token: object) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_token, loaded.eos_id) == ("</s>", 340)


def test_another_eos_token_is_another_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert Tokenizer(backend, "a").digest != tokenizer.digest


def test_ids_beyond_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    tokenizer.check_fits(340)
    tokenizer.check_fits(50400)
    with pytest.raises(UserError, match="ids up to 339, but the model's vocab_size is 339"):
        tokenizer.check_fits(339)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "No such file or directory"),
        ({"tokenizer.json": "{"}, "EOF while parsing"),
        ({"tokenizer.json": "\xff"}, "can't decode"),
        ({"vocab.json": "{}"}, "give a tokenizer.json"),
        ({"vocab.json": "[]", "merges.txt": ""}, "give a tokenizer.json"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b c d\n"}, "Merges text file invalid at line 1"),
        ({"tokenizer.json": "[" * 100_000}, "invalid type: sequence"),
        ({"tokenizer.json": "cos\nsystem\n(S'x'\ntR."}, "expected value at line 1 column 1"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "[" * 100_000}, "give a tokenizer.json"),
    ],
)
def test_a_folder_without_a_readable_tokenizer(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=reason) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value).startswith(f"tokenizer {tmp_path}: ")
    assert "give a tokenizer.json, a folder that holds one, or vocab.json + merges.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"])
def test_a_pipe_is_not_waited_for(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "copy" / name)
    with pytest.raises(UserError, match=f"{name} is not a regular file"):
        Tokenizer.load(tmp_path / "copy")


@pytest.mark.parametrize(
    "change",
    [
        {"vocab": {"a": -1}},
        {"merges": [["no", "such"]]},
        {"type": "Evil"},
        {"continuing_subword_prefix": "#" * 9, "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]},  # a panic in Rust
    ],
)
def test_an_inconsistent_tokenizer_json(folder: Path, tmp_path: Path, change: dict[str, object]) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"] |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"give a tokenizer\.json, a folder that holds one") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_eos_token(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="token to end documents with"):
        Tokenizer.load(tmp_path)


def test_choose(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert Tokenizer.choose(str(folder), None).digest == tokenizer.digest
    assert Tokenizer.choose(None, str(folder)).digest == tokenizer.digest
    assert Tokenizer.choose(str(folder), str(tmp_path)).digest == tokenizer.digest
    with pytest.raises(UserError, match="tokenizer is missing: give tokenizer=FOLDER, or init_from=FOLDER"):
        Tokenizer.choose(None, None)
