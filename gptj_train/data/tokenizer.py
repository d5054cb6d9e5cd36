"""The tokenizer, a byte-level BPE: loaded from a tokenizer.json or from GPT-2's two files, or trained."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptj_train.data import unused_rows
from gptj_train.data.fast_bpe import FastBPE
from gptj_train.data.unused_rows import AddedToken
from gptj_train.errors import UserError

EOS_TOKEN = "<|endoftext|>"

_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


class Tokenizer:
    """A ``tokenizers`` tokenizer with an EOS token, which ends every document.

    Attributes:
        eos_token: the EOS token, "<|endoftext|>" in GPT-J.
        eos_id: its id.
    """

    def __init__(self, backend: Backend, eos_token: str = EOS_TOKEN) -> None:
        eos_id = backend.token_to_id(eos_token)
        if eos_id is None:
            raise UserError(f"the tokenizer has no {eos_token!r} token to end documents with")
        # A tokenizer.json may ask for both, but documents are packed as they are.
        backend.no_truncation()
        backend.no_padding()
        self.eos_token = eos_token
        self.eos_id = eos_id
        self._backend = backend

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a tokenizer.json, or a folder with that or with vocab.json and merges.txt.

        Raises:
            UserError: no readable tokenizer there.
        """
        path = Path(path)
        try:
            for file in (path, *(path / name for name in _FILES)):
                # Opening a named pipe would wait forever.
                if file.exists() and not (file.is_file() or file.is_dir()):
                    raise UserError(f"{file.name} is not a regular file")
            if (path / "vocab.json").is_file() and not (path / "tokenizer.json").is_file():
                return cls(_byte_level(models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))))
            file = path / "tokenizer.json" if path.is_dir() else path
            return cls(Backend.from_str(file.read_text(encoding="utf-8")), _eos_token(file.parent))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the backend raises plain Exceptions, and its panics are BaseExceptions
            raise UserError(
                f"tokenizer {path}: {error}; give a tokenizer.json, a folder that holds one, or vocab.json + merges.txt"
            ) from None

    @classmethod
    def choose(cls, path: str | None, init_from: str | None) -> Tokenizer:
        """Load the tokenizer at ``path``, or else the one in the folder of the initial weights."""
        if path is None and init_from is None:
            raise UserError("tokenizer is missing: give tokenizer=FOLDER, or init_from=FOLDER with one inside")
        return cls.load(path if path is not None else str(init_from))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE of at most ``vocab_size`` entries; the EOS token has id 0."""
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS_TOKEN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def from_json(cls, text: str, eos_token: str) -> Tokenizer:
        """Make the tokenizer that ``to_json`` describes."""
        return cls(Backend.from_str(text), eos_token)

    def to_json(self) -> str:
        """Return the content of a tokenizer.json."""
        return self._backend.to_str()

    def with_added_tokens(self, tokens: Iterable[AddedToken], rows: int) -> tuple[Tokenizer, dict[int, list[int]]]:
        """Give tokens that the tokenizer lacks unused rows of an embedding of ``rows``.

        Returns:
            The extended tokenizer; and for each new row that is initialized from others, the ids of those, of whose
            rows it is the mean.

        Raises:
            UserError: more tokens than unused rows.
        """
        tokens = list(tokens)
        backend, places = unused_rows.with_added_tokens(self._backend, [token.name for token in tokens], rows)
        mean_rows = {}
        for token in tokens:
            # A token that the tokenizer had before keeps its row, which may be trained by now.
            if token.like and token.name in places:
                # By this tokenizer, without the added tokens: one of them has no row yet to take the mean of.
                mean_rows[places[token.name]] = [number for word in token.like for number in self.encode(word)]
        return Tokenizer(backend, self.eos_token), mean_rows

    def pad_id(self, rows: int) -> int:
        """Return the id of the padding token: the last unused row of the embedding, or EOS if all are used."""
        unused = unused_rows.pad_row(self._backend, rows)
        return self.eos_id if unused is None else unused

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    @property
    def largest_id(self) -> int:
        return max(self._backend.get_vocab().values())

    @property
    def digest(self) -> str:
        """The sha256 of everything that determines the ids."""
        return hashlib.sha256((self._backend.to_str() + self.eos_token).encode()).hexdigest()

    def check_fits(self, vocab_size: int) -> None:
        """Raise UserError if an id has no row in an embedding of ``vocab_size`` rows."""
        if self.largest_id >= vocab_size:
            raise UserError(
                f"the tokenizer has ids up to {self.largest_id}, but the model's vocab_size is {vocab_size}; "
                "use the model's own tokenizer or raise model.vocab_size"
            )

    def encode(self, text: str) -> list[int]:
        """Encode a prompt; special tokens in the text count as such."""
        self._backend.encode_special_tokens = False
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Encode data on all cores; text that spells a special token is plain text."""
        if self._fast_bpe is not None:
            # tiktoken fails on a few texts, such as a million spaces in a row.
            with contextlib.suppress(ValueError):
                return self._fast_bpe.encode_texts(texts)
        self._backend.encode_special_tokens = True
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Encode data as ``encode_texts``, and end each text with the EOS token."""
        return [[*ids, self.eos_id] for ids in self.encode_texts(texts)]

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Encode data, and find the characters of each token.

        The offsets are counted from the bytes that the ids stand for, so that no setting of the tokenizer shifts
        them. A character that is split between tokens belongs to each of them.

        Returns:
            ids (T) int64, and offsets (T, 2) int64: each token's first character, and one past its last.

        Raises:
            UserError: a tokenizer whose ids do not stand for exactly the bytes of the text.
        """
        self._backend.encode_special_tokens = True
        ids = np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        sizes = self.bytes_per_token[ids]
        ends = sizes.cumsum()
        starts = ends - sizes
        bytes_per_character = [len(character.encode()) for character in text]
        character_of_byte = np.arange(len(text)).repeat(bytes_per_character)
        if len(character_of_byte) != sizes.sum():
            raise UserError(
                "the tokenizer changes the text or is not byte-level, so answers cannot be located in it; "
                "use GPT-J's own, or one without normalizer and prefix space"
            )
        first = character_of_byte[starts]
        last = character_of_byte[ends - 1]
        return ids, np.stack((first, last + 1), axis=1)

    def decode(self, ids: list[int]) -> str:
        """Decode ids without special tokens."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def decode_all(self, ids: list[int]) -> str:
        """Decode ids with special tokens spelled out."""
        return self._backend.decode(ids, skip_special_tokens=False)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens -> their ids."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    @cached_property
    def _fast_bpe(self) -> FastBPE | None:
        return FastBPE.of(self._backend)

    @cached_property
    def bytes_per_token(self) -> np.ndarray:
        """(largest_id + 1) int64: the UTF-8 bytes that each id stands for; 0 for special tokens."""
        added = {}
        for token in self._backend.get_added_tokens_decoder().values():
            added[token.content] = 0 if token.special else len(token.content.encode())
        sizes = np.zeros(self.largest_id + 1, dtype=np.int64)
        for text, number in self._backend.get_vocab().items():
            # The byte-level alphabet writes each byte as one character; added tokens are written as they are.
            sizes[number] = added.get(text, len(text))
        return sizes

    def save(self, folder: Path, rows: int | None = None) -> None:
        """Write the three files from which Transformers loads a tokenizer.

        Args:
            rows: of the model's embedding; each gets an entry, and the last unused one is the padding token. None:
                only the tokenizer's own entries, and no padding token.

        Raises:
            OSError: a full disk.
        """
        # The setting is saved: Transformers should encode prompts as ``encode`` does.
        self._backend.encode_special_tokens = False
        backend = self._backend
        special_tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), self.eos_token)
        if rows is not None:
            backend = unused_rows.with_all_rows_named(backend, rows)
            special_tokens["pad_token"] = str(backend.id_to_token(self.pad_id(rows)))
        try:
            backend.save(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers has no exception class for it
            raise OSError(str(error)) from None
        config = {
            **special_tokens,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens, indent=2) + "\n")


def _byte_level(model: models.BPE) -> Backend:
    """Make the tokenizer of GPT-2 around a BPE model."""
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS_TOKEN])
    return backend


def _eos_token(folder: Path) -> str:
    """Return the EOS token that tokenizer_config.json names, as a string or in a dictionary."""
    try:
        token = json.loads((folder / "tokenizer_config.json").read_text()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return EOS_TOKEN
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else EOS_TOKEN
