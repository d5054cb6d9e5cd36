"""Load a tokenizer's folder as Transformers reads it: the vocabulary, the added tokens, and the token that ends text.

A folder holds tokenizer.json, or GPT-2's vocab.json and merges.txt. Beside them, tokenizer_config.json,
special_tokens_map.json and added_tokens.json name special and added tokens, each of them optional.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from gptj_train.data.unused_rows import with_names
from gptj_train.errors import UserError
from gptj_train.failed_download import what_it_is
from gptj_train.untrusted_files import check_stays, parse_json

EOS_TOKEN = "<|endoftext|>"

_CONFIG, _SPECIAL, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FILES = ("tokenizer.json", "vocab.json", "merges.txt", _CONFIG, _SPECIAL, _ADDED)
_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def load_backend(path: Path) -> tuple[Backend, str]:
    """Return the tokenizer of a folder or tokenizer.json, and its EOS token.

    Raises:
        UserError: a file that is no such thing, or an EOS token that the vocabulary lacks: none is ever invented.
        Exception: whatever the library raises for a file that it cannot read.
    """
    if not path.exists():
        made = " (the script that the preset names makes it)" if "quickstart" in path.parts else ""
        raise UserError(f"no such file or folder here{made}")
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        for name in _FILES:
            check_stays(path, name)
    elif path.exists() and not path.is_file():
        # The path itself is the user's own and may be a link, but opening a named pipe would wait forever.
        raise UserError(f"{path.name} is not a regular file")
    named = _Named(folder)
    if (path / "vocab.json").is_file() and not (path / "tokenizer.json").is_file():
        model = models.BPE(_read_object(path / "vocab.json"), _read_merges(path / "merges.txt"))
        backend = byte_level(model, add_prefix_space=named.config.get("add_prefix_space") is True)
        # As in GPT-2, special tokens are entries of vocab.json, which does not say so.
        known = [token for token in sorted(named.special) if backend.token_to_id(token) is not None]
        backend.add_special_tokens(known)
    else:
        file = path / "tokenizer.json" if path.is_dir() else path
        backend = Backend.from_str(_read_text(file))
    for special in (True, False):
        missing = {}
        for token, number in named.added.items():
            if (token in named.special) is special and backend.token_to_id(token) is None:
                missing[number] = token
        if missing:
            _check_free(backend, missing, folder)
            backend = with_names(backend, missing, special=special)
    return backend, named.eos_token


def has_tokenizer(folder: str | Path) -> bool:
    """Return whether a folder holds a tokenizer's files."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def byte_level(model: models.BPE, *, add_prefix_space: bool = False) -> Backend:
    """Make the tokenizer of GPT-2 around a BPE model."""
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


class _Named:
    """What the files beside the vocabulary name.

    Attributes:
        config: tokenizer_config.json.
        eos_token: the EOS token; GPT-2's if no file names one.
        special: all special tokens, the EOS token among them.
        added: added token -> its id.
    """

    def __init__(self, folder: Path) -> None:
        self.config = _read_optional(folder / _CONFIG)
        special_map = _read_optional(folder / _SPECIAL)
        decoder = self.config.get("added_tokens_decoder")
        # As in Transformers: the map is of older versions, which did not write the decoder, and then counts first.
        sources = [self.config, special_map] if decoder else [special_map, self.config]
        self.special: set[str] = set()
        for source in sources:
            tokens = [source.get(key) for key in _SPECIAL_KEYS]
            for key in _LISTS:
                listed = source.get(key) or []
                tokens += listed.values() if isinstance(listed, dict) else listed
            self.special |= {text for text in map(_content, tokens) if text is not None}
        for source in sources:
            token = source.get("eos_token")
            if token is not None and _content(token) is None:
                # Documents that end with another token than the model's own would be learnt without a word.
                file = _CONFIG if source is self.config else _SPECIAL
                raise UserError(f"{file}: eos_token must be text, got {token!r}")
        ends = [_content(source.get("eos_token")) for source in sources]
        self.eos_token = next((end for end in ends if end is not None), EOS_TOKEN)
        self.special.add(self.eos_token)
        self.added: dict[str, int] = {}
        for token, number in _read_optional(folder / _ADDED).items():
            self.added[token] = _id(number, _ADDED)
        for number, token in (decoder or {}).items():
            content = _content(token)
            if content is not None:
                self.added[content] = _id(number, _CONFIG)
                if isinstance(token, dict) and token.get("special"):
                    self.special.add(content)


def _content(token: Any) -> str | None:
    """Return the text of a token, which is written as a string or as a dictionary."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _id(number: Any, file: str) -> int:
    try:
        return int(number)
    except (TypeError, ValueError):
        raise UserError(f"{file}: {number!r} is no token id") from None


def _check_free(backend: Backend, added: dict[int, str], folder: Path) -> None:
    for number, token in added.items():
        other = backend.id_to_token(number)
        if other is not None:
            raise UserError(f"{folder}: {token!r} and {other!r} both have the id {number}")


def _read_optional(file: Path) -> dict[str, Any]:
    return _read_object(file) if file.is_file() else {}


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = parse_json(_read_bytes(file))
    except ValueError as error:
        raise UserError(f"{file.name} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{file.name} is not a JSON object")
    return value


def _read_bytes(file: Path) -> bytes:
    data = file.read_bytes()
    instead = what_it_is(data[:1024])
    if instead is not None:
        raise UserError(f"{file.name} is {instead}")
    return data


def _read_text(file: Path) -> str:
    return _read_bytes(file).removeprefix(codecs.BOM_UTF8).decode()


def _read_merges(file: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read_text(file).replace("\r\n", "\n").split("\n"), start=1):
        if not line or line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise UserError(f"Merges text file invalid at line {number}")
        merges.append((parts[0], parts[1]))
    return merges
