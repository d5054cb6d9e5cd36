"""Plain text on the command line arrives to the letter, whatever Hydra's grammar or OmegaConf would make of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typed_configs import config

from gptj_train.config import ClmConfig, GenerateConfig
from gptj_train.launch.command_line import compose

BACKSLASH = "\\"


@pytest.mark.parametrize(
    "prompt",
    [
        *("[INST] Hello [/INST]", "[1, 2]", "[]", "[", "{a: 1}", "hello, world", "a=b", "true", "1e3", "~x"),
        *("${x}", "${", "$", "a ${b} c", f"a{BACKSLASH}${{b}}", f"a{BACKSLASH * 2}${{b}}", f"a{BACKSLASH * 3}${{b}}"),
        *("it's", "'", f"{BACKSLASH}'", BACKSLASH, f"x{BACKSLASH}", "'a' 'b'", "two\nlines", " leading", "trailing "),
    ],
)
def test_a_prompt_needs_no_quotes(prompt: str) -> None:
    assert compose("generate", ["checkpoint=x", f"prompt={prompt}"], GenerateConfig).prompt == prompt


@pytest.mark.parametrize(("value", "prompt"), [("'a, b'", "a, b"), ('"[x]"', "[x]"), ("''", ""), ("null", None)])
def test_quotes_and_null_keep_their_meaning(value: str, prompt: str | None) -> None:
    assert compose("generate", ["checkpoint=x", f"prompt={value}"], GenerateConfig).prompt == prompt


def test_lists_and_interpolations_of_other_keys_are_parsed() -> None:
    overrides = ["output_dir=runs/a", "max_steps=1", "init_from=${output_dir}/export", "data.train=[a.txt, b.txt]"]
    composed = compose("clm", overrides, ClmConfig)
    assert composed.init_from == "runs/a/export"
    assert composed.data.train == ["a.txt", "b.txt"]


def test_a_tilde_is_the_home_folder_in_any_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell leaves it as it is in the middle of a word."""
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = config(
        "clm",
        ClmConfig,
        "output_dir=~/run",
        "data.train=['~/a.jsonl','b~/c']",
        "data.validation=~/b.jsonl",
        "data.cache_dir=~/cache",
        "init_from=~/model",
        "sample_prompt=~/x",
    )
    assert (cfg.output_dir, cfg.init_from) == (f"{tmp_path}/run", f"{tmp_path}/model")
    assert cfg.data.train == [f"{tmp_path}/a.jsonl", "b~/c"]
    assert (cfg.data.validation, cfg.data.cache_dir) == (f"{tmp_path}/b.jsonl", f"{tmp_path}/cache")
    assert cfg.sample_prompt == "~/x"
