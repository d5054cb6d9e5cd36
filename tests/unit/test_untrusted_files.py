"""JSON of strangers has one meaning, and no file of a folder leads out of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.untrusted_files import check_stays, parse_json, read_json
from gptj_train.weights.moments import moments_beside

BAD_JSON = {
    "nothing": (b"", "Expecting value"),
    "half": (b'{"a": ', "Expecting value"),
    "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "it has 'c' twice"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is not JSON"),
    "nested": (b"[" * 101 + b"]" * 101, "it is nested too deeply"),
    "nested beyond Python": (b"[" * 100_000, "it is nested too deeply"),
    "not UTF-8": (b'{"a": "\xff"}', "can't decode byte 0xff"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "can't decode byte 0xff"),
    "an endless number": (b"9" * 10_000, "limit"),
}


@pytest.mark.parametrize(("data", "reason"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        parse_json(data)
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(UserError, match=reason):
        read_json(tmp_path / "x.json", 1_000_000)


def test_good_json(tmp_path: Path) -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, 2.5, "\xc3\xa9", null]}') == {"a": [1, 2.5, "\u00e9", None]}
    (tmp_path / "x.json").write_text("[1, 2]")
    assert read_json(tmp_path / "x.json", 6) == [1, 2]
    with pytest.raises(UserError, match="it has more than 5 bytes"):
        read_json(tmp_path / "x.json", 5)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with every file that is read from one."""
    folder = tmp_path / "model"
    config = GPTJConfig(vocab_size=300, n_positions=16, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    GPTJForCausalLM(config).save_pretrained(folder)
    Tokenizer.train(["some text"], 300).save(folder)
    (folder / "adam").mkdir()
    (folder / "adam" / "state.json").write_text('{"step": 1}')
    return folder


def read_everything(folder: Path) -> None:
    GPTJConfig.from_pretrained(folder)
    Tokenizer.load(folder)
    shapes = {name: tensor.shape for name, tensor in GPTJForCausalLM.from_pretrained(folder).named_parameters()}
    with moments_beside(folder, shapes, new_head=False):
        pass


READ = [
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    "adam/state.json",
]


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere/at/all")


def outside(path: Path) -> None:
    aside = path.parents[1] / f"aside-{path.name}"
    path.rename(aside.parent.parent / aside.name)
    path.symlink_to(aside.parent.parent / aside.name)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("damage", [outside, device, pipe, directory, loop, dangling])
@pytest.mark.parametrize("file", READ)
def test_no_file_of_a_model_folder_leads_out(model: Path, file: str, damage: object) -> None:
    assert callable(damage)
    damage(model / file)
    with pytest.raises(UserError) as caught:
        read_everything(model)
    assert "\n" not in str(caught.value)
    assert Path(file).name in str(caught.value) or "model.safetensors" in str(caught.value)


def test_links_within_the_folder_are_followed(model: Path) -> None:
    (model / "files").mkdir()
    for file in ("config.json", "tokenizer.json"):
        (model / file).rename(model / "files" / file)
        (model / file).symlink_to(Path("files") / file)
    GPTJConfig.from_pretrained(model)
    Tokenizer.load(model)
    check_stays(model, "absent.json")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"eos_token": 5}', '{"eos_token": {"content": []}}', "\xff"])
def test_a_damaged_tokenizer_config_is_refused(model: Path, text: str) -> None:
    (model / "tokenizer_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        Tokenizer.load(model)


def test_a_tokenizer_that_cannot_encode_every_text_is_refused(tmp_path: Path) -> None:
    backend = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"<|endoftext|>": 0, "a": 1}, "unk_token": "?"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(UserError, match="WordLevel error: Missing"):
        Tokenizer.load(tmp_path)
