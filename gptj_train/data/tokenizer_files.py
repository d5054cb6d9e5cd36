"""Write a tokenizer's folder for old and new readers: Transformers 4 and 5, other runtimes, other languages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend


def write_tokenizer_files(
    folder: Path,
    backend: Backend,
    special_tokens: Mapping[str, str],
    *,
    max_length: int | None,
    padding_side: str,
    chat_template: str | None,
) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json; of a BPE also vocab.json and merges.txt.

    Args:
        special_tokens: name, such as "eos_token", -> the token.
        max_length: tokens that the model reads at most; None leaves it to the reader.
        chat_template: in Jinja.

    Raises:
        OSError: a full disk.
    """
    description = json.loads(backend.to_str())
    merges = _plain_merges(description)
    if merges is not None:
        # As texts: pairs in lists are refused by tokenizers before 0.20 and by readers in other languages.
        description["model"]["merges"] = merges
        _write_vocab_and_merges(folder, backend, merges)
    _write_json(folder / "tokenizer.json", description)
    config: dict[str, Any] = {
        **special_tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": padding_side,
    }
    if max_length is not None:
        config["model_max_length"] = max_length
    if chat_template is not None:
        # Here and not in a chat_template.jinja: every version reads this key.
        config["chat_template"] = chat_template
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special_tokens)


def _plain_merges(description: Mapping[str, Any]) -> list[str] | None:
    """Return the merges of a BPE as "a b"; None for another model, or where a part has a space in it."""
    model = description["model"]
    if model["type"] != "BPE":
        return None
    merges = []
    for merge in model["merges"]:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2 or any(" " in part for part in parts):
            return None
        merges.append(" ".join(parts))
    return merges


def _write_vocab_and_merges(folder: Path, backend: Backend, merges: list[str]) -> None:
    """Write GPT-2's two files. They have no place for added tokens, so these are entries like the others."""
    by_id = sorted(backend.get_vocab().items(), key=lambda entry: entry[1])
    _write_json(folder / "vocab.json", dict(by_id))
    lines = ["#version: 0.2", *merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
