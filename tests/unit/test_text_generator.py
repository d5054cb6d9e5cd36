"""Streaming, batches and stop strings give the same text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.inference.text_generator import TextGenerator, read_prompts, sample_from

PROMPTS = ["Once", "upon a time, a bé", "naïve 🙂 text"]
OPTIONS = {"max_new_tokens": 30, "do_sample": False, "repetition_penalty": 1.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, whose text is a jumble of bytes: many of them parts of characters."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train(PROMPTS * 5, vocab_size=280)
    config = GPTJConfig(vocab_size=280, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, eos_token_id=0)
    model = GPTJForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    tokenizer.save(path)
    return path


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_streamed_pieces_join_to_the_completed_text(folder: Path, prompt: str) -> None:
    writer = TextGenerator(folder)
    pieces = list(writer.stream(prompt, **OPTIONS))
    (whole,) = writer.complete([prompt], **OPTIONS)
    assert "".join(pieces) == whole
    assert len(whole) > 5
    assert len(pieces) > 3
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def test_a_batch_says_what_each_prompt_says_alone(folder: Path) -> None:
    writer = TextGenerator(folder)
    assert writer.complete(PROMPTS, **OPTIONS) == [writer.complete([prompt], **OPTIONS)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_text_ends_before_a_stop_string(folder: Path, length: int) -> None:
    writer = TextGenerator(folder)
    (whole,) = writer.complete([PROMPTS[0]], **OPTIONS)
    stop = [whole[4 : 4 + length], "absent"]
    expected = whole[: whole.index(stop[0])]
    assert writer.complete([PROMPTS[0]], stop, **OPTIONS) == [expected]
    assert "".join(writer.stream(PROMPTS[0], stop, **OPTIONS)) == expected


@pytest.mark.parametrize("at", [0, 3, 7])
def test_text_ends_before_a_special_token(folder: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """As a chat's turn does; the token's text is in no decoded text."""
    writer = TextGenerator(folder)
    ids = writer.encode(PROMPTS[0])
    tokens = writer.model.generate(torch.tensor([ids]), eos_token_id=[], **OPTIONS)[0, len(ids) :].tolist()
    before = tokens[: tokens.index(tokens[at])]
    expected = writer.tokenizer.decode(ids + before)[len(PROMPTS[0]) :]
    monkeypatch.setitem(writer.tokenizer.__dict__, "special_tokens", {"<|turn|>": tokens[at]})
    assert writer.complete([PROMPTS[0]], ["<|turn|>"], **OPTIONS) == [expected]
    assert "".join(writer.stream(PROMPTS[0], ["<|turn|>"], **OPTIONS)) == expected


def test_special_tokens_are_known_by_name(tmp_path: Path) -> None:
    Tokenizer.train(PROMPTS * 5, vocab_size=270).save(tmp_path, 280)
    special = Tokenizer.load(tmp_path).special_tokens
    assert special["<|endoftext|>"] == 0
    assert sorted(special.values())[-1] == 279


@pytest.mark.parametrize("count", [1, 500])
def test_a_sample_of_a_long_prompt_goes_on_from_its_end(folder: Path, count: int) -> None:
    prompt = PROMPTS[0] * count
    assert len(sample_from(folder, prompt, seed=1)) > len(prompt)


def test_an_empty_prompt_is_told(folder: Path) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        TextGenerator(folder).complete([""])


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\nthree\n")
    assert read_prompts(str(file), 2) == [["one", "two"], ["three"]]
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(str(file), 2)
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(str(tmp_path / "absent"), 2)


def test_only_a_line_feed_ends_a_prompt(tmp_path: Path) -> None:
    """As in every data file: Unicode's other line ends, a form feed and a lone carriage return are text."""
    prompts = ["one\u2028still\u2029one", "two\u0085\x0b\x0ctwo", "three\rthree \x1c\x1d\x1e"]
    file = tmp_path / "prompts.txt"
    for end in ("\n", "\r\n"):
        file.write_bytes(b"\xef\xbb\xbf" + end.join([*prompts, "", "four"]).encode())
        assert read_prompts(str(file), 8) == [[*prompts, "four"]]


def test_beams_come_out_at_once_and_are_the_models(folder: Path) -> None:
    writer = TextGenerator(folder)
    ids = torch.tensor([writer.tokenizer.encode("Once")])
    expected = writer.tokenizer.decode(writer.model.generate(ids, num_beams=6, max_new_tokens=8)[0].tolist())[4:]
    assert expected != writer.complete(["Once"], max_new_tokens=8)[0]
    assert list(writer.stream("Once", num_beams=6, max_new_tokens=8)) == [expected]


def test_a_batch_ends_when_every_text_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TextGenerator(folder)
    (whole,) = writer.complete([PROMPTS[0]], **OPTIONS)
    steps = []
    next_logits = writer.model._next_logits
    monkeypatch.setattr(writer.model, "_next_logits", lambda *args: steps.append(1) or next_logits(*args))
    assert writer.complete([PROMPTS[0]], [whole[2:5]], **OPTIONS) == [whole[: whole.index(whole[2:5])]]
    assert len(steps) < 10
