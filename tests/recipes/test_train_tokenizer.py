"""recipes/train_tokenizer.py: from files of text to a folder that we and Transformers load."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gptj_train.data.tokenizer import Tokenizer

RECIPE = str(Path(__file__).parents[2] / "recipes" / "train_tokenizer.py")
LINES = [f"The cat number {number} sat on the mat and looked at the dog.\n" for number in range(200)]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the recipe in a folder with text.txt, text.jsonl and chats.jsonl; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(LINES))
    Path("text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    chats = [[{"role": "user", "content": line}, {"role": "assistant", "content": line.upper()}] for line in LINES]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [RECIPE, *arguments])
        code = 0
        try:
            runpy.run_path(RECIPE, run_name="__main__")
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize("source", ["text.txt", "text.jsonl", "text.txt,text.jsonl", "chats.jsonl"])
def test_a_folder_that_loads(command: Command, source: str) -> None:
    code, out, err = command(f"data.train={source}", "output_dir=a/new/folder", "vocab_size=300")
    assert (code, err) == (0, "")
    assert "tokenizer of 300 entries from " in out
    assert "Train with tokenizer=a/new/folder; model.vocab_size must be at least 300\n" in out
    folder = Path("a/new/folder")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
    ]
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    text = "The cat, Größe 東京 and the dog\n"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == text
    assert len(ours.encode("The cat number 7 sat")) < len("The cat number 7 sat")  # pairs were merged
    assert theirs.eos_token_id == ours.eos_id


def test_special_tokens_are_single_ids(command: Command) -> None:
    code, _, _ = command(
        "data.train=text.txt", "output_dir=made", "vocab_size=300", 'special_tokens=["<|user|>", "<|assistant|>"]'
    )
    assert code == 0
    tokenizer = Tokenizer.load("made")
    assert set(tokenizer.special_tokens) == {"<|endoftext|>", "<|user|>", "<|assistant|>"}
    assert len(tokenizer) == 300
    assert AutoTokenizer.from_pretrained("made")("<|user|>")["input_ids"] == [tokenizer.special_tokens["<|user|>"]]


def test_what_is_left_out_is_named(command: Command) -> None:
    _, out, _ = command("data.train=text.txt", "output_dir=made", "vocab_size=9000", "max_megabytes=0.001")
    assert "fewer than vocab_size=9000: the text has no more pairs to merge" in out
    assert len(Tokenizer.load("made")) < 9000
    _, out, _ = command("data.train=[text.jsonl]", "output_dir=made", "vocab_size=300", "max_megabytes=0.001")
    assert "from 1.1 kB of text (the first; more was left out by max_megabytes=0.001)" in out


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("data.train=null", "data.train is null; give files to learn from"),
        ("data.train=gone.txt", "data.train: no file at 'gone.txt' (working directory: "),
        ("data.train=txt.txt", "did you mean 'text.txt'?"),
        ("vocab_size=100", "vocab_size must be at least 258"),
        ("output_dir=text.txt", "output_dir=text.txt: not a writable folder"),
        ("max_megabytes=0", "max_megabytes must be above 0"),
        ("vocabulary_size=300", "unknown config key 'vocabulary_size'; here it is vocab_size"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(command: Command, change: str, line: str) -> None:
    code, _, err = command("data.train=text.txt", "output_dir=made", "vocab_size=300", change)
    assert code == 2
    assert err.startswith("error: ")
    assert line in err
    assert err.count("\n") == 1
    assert not Path("made").exists()


def test_save_takes_a_text_and_makes_the_folder(tmp_path: Path) -> None:
    """The call of docs/data.md."""
    made = Tokenizer.train(LINES, vocab_size=300)
    made.save(str(tmp_path / "some" / "folder"))
    assert Tokenizer.load(tmp_path / "some" / "folder").encode("the cat") == made.encode("the cat")
