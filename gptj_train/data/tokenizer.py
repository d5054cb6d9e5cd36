"""Byte-level BPE: load GPT-J's own or any tokenizer.json, or train one."""

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

END_OF_TEXT = "<|endoftext|>"

_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


class Tokenizer:
    """A ``tokenizers`` tokenizer with the end-of-text id that separates documents."""

    def __init__(self, backend: Backend, end_of_text: str = END_OF_TEXT) -> None:
        end_id = backend.token_to_id(end_of_text)
        if end_id is None:
            raise UserError(f"the tokenizer has no {end_of_text!r} token to end documents with")
        # A tokenizer.json may ask for either; documents are never cut or filled up.
        backend.no_truncation()
        backend.no_padding()
        self.end_of_text, self.end_id = end_of_text, end_id
        self._backend = backend

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json, or a folder with that or with vocab.json and merges.txt.

        Raises:
            UserError: nothing readable there.
        """
        path = Path(path)
        try:
            for file in (path, *(path / name for name in _FILES)):
                if file.exists() and not (file.is_file() or file.is_dir()):  # a pipe would be waited for without end
                    raise UserError(f"{file.name} is not a regular file")
            if (path / "vocab.json").is_file() and not (path / "tokenizer.json").is_file():
                return cls(_byte_level(models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))))
            file = path / "tokenizer.json" if path.is_dir() else path
            return cls(Backend.from_str(file.read_text(encoding="utf-8")), _end_of_text(file.parent))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the backend raises bare Exceptions, and panics are not even that
            raise UserError(
                f"tokenizer {path}: {error}; give a tokenizer.json, a folder that holds one, or vocab.json + merges.txt"
            ) from None

    @classmethod
    def choose(cls, path: str | None, init_from: str | None) -> Tokenizer:
        """The one named, or the one that came with the initial weights."""
        if path is None and init_from is None:
            raise UserError("tokenizer is missing: give tokenizer=FOLDER, or init_from=FOLDER with one inside")
        return cls.load(path if path is not None else str(init_from))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A byte-level BPE of at most ``vocab_size`` entries; id 0 ends documents."""
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    def with_added_tokens(self, words: Iterable[AddedToken], rows: int) -> tuple[Tokenizer, dict[int, list[int]]]:
        """The tokenizer with words added in spare rows of an embedding of ``rows``; those it knows stay.

        Returns:
            It, and for each row that is to start from the mean of others those others' ids.

        Raises:
            UserError: more words than spare rows.
        """
        words = list(words)
        backend, places = unused_rows.with_added_tokens(self._backend, [word.name for word in words], rows)
        means = {
            places[word.name]: [number for like in word.like for number in self.encode(like)]
            for word in words
            if word.like and word.name in places
        }
        return Tokenizer(backend, self.end_of_text), means

    def pad_id(self, rows: int) -> int:
        """What fills up batches: a row of the embedding that no word uses, or the end of text without one."""
        spare = unused_rows.pad_row(self._backend, rows)
        return self.end_id if spare is None else spare

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    @property
    def largest_id(self) -> int:
        return max(self._backend.get_vocab().values())

    def to_json(self) -> str:
        """A tokenizer.json, from which ``from_json`` makes this tokenizer again."""
        return self._backend.to_str()

    @classmethod
    def from_json(cls, text: str, end_of_text: str) -> Tokenizer:
        return cls(Backend.from_str(text), end_of_text)

    @property
    def digest(self) -> str:
        """sha256 of all that determines the ids."""
        return hashlib.sha256((self._backend.to_str() + self.end_of_text).encode()).hexdigest()

    def check_fits(self, vocab_size: int) -> None:
        """Raises UserError when an id has no row in an embedding of ``vocab_size`` rows."""
        if self.largest_id >= vocab_size:
            raise UserError(
                f"the tokenizer has ids up to {self.largest_id}, but the model's vocab_size is {vocab_size}; "
                "use the model's own tokenizer or raise model.vocab_size"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt; special tokens in the text count as such."""
        self._backend.encode_special_tokens = False
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts, on all cores; what spells a special token stays text."""
        if self._fast_bpe is not None:
            with contextlib.suppress(ValueError):  # of tiktoken: a million blanks in a row are too many for it
                return self._fast_bpe.encode_texts(texts)
        self._backend.encode_special_tokens = True
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """As ``encode_texts``, each ended by ``end_id``."""
        return [[*ids, self.end_id] for ids in self.encode_texts(texts)]

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids (T) of a text, all of it taken as text, and the characters (T, 2) of each: first, and past the last.

        Counted from the bytes that the ids stand for, so that no setting of the tokenizer shifts them. A
        character that is cut into several tokens belongs to each of them.

        Raises:
            UserError: a tokenizer whose ids do not stand for exactly the bytes of the text.
        """
        self._backend.encode_special_tokens = True
        ids = np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        ends = self.bytes_per_token[ids].cumsum()
        width_of_character = [len(character.encode()) for character in text]
        character_of_byte = np.arange(len(text)).repeat(width_of_character)
        if len(character_of_byte) != (ends[-1] if len(ids) else 0):
            raise UserError(
                "the tokenizer changes the text or is not byte-level, so that answers cannot be placed; "
                "use GPT-J's own, or one without normalizer and prefix space"
            )
        starts = ends - self.bytes_per_token[ids]
        return ids, np.stack((character_of_byte[starts], character_of_byte[ends - 1] + 1), axis=1)

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def decode_all(self, ids: list[int]) -> str:
        """As ``decode``, special tokens spelt out."""
        return self._backend.decode(ids, skip_special_tokens=False)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Id of each token that stands for no text."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    @cached_property
    def _fast_bpe(self) -> FastBPE | None:
        return FastBPE.of(self._backend)

    @cached_property
    def bytes_per_token(self) -> np.ndarray:
        """(largest_id + 1) int64: the UTF-8 bytes that each id stands for; 0 for special tokens."""
        sizes = np.zeros(self.largest_id + 1, dtype=np.int64)
        added = self._backend.get_added_tokens_decoder().values()
        spelt_out = {token.content: 0 if token.special else len(token.content.encode()) for token in added}
        for token, number in self._backend.get_vocab().items():
            # The byte-level alphabet writes every byte as one character; added tokens stand as they are.
            sizes[number] = spelt_out.get(token, len(token))
        return sizes

    def save(self, folder: Path, rows: int | None = None) -> None:
        """Write the three files that Transformers reads a tokenizer from.

        Args:
            rows: of the model's embedding; each gets an entry, as other runtimes ask for, and a spare one pads.
        """
        self._backend.encode_special_tokens = False
        backend = self._backend if rows is None else unused_rows.filled(self._backend, rows)
        try:
            backend.save(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers has no class of its own for a full disk
            raise OSError(str(error)) from None
        names = {"bos_token": self.end_of_text, "eos_token": self.end_of_text, "unk_token": self.end_of_text}
        if rows is not None:
            names["pad_token"] = str(backend.id_to_token(self.pad_id(rows)))
        config = {
            **names,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def _byte_level(model: models.BPE) -> Backend:
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return backend


def _end_of_text(folder: Path) -> str:
    try:
        token = json.loads((folder / "tokenizer_config.json").read_text()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return END_OF_TEXT
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else END_OF_TEXT
