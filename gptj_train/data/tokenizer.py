"""The tokenizer, a byte-level BPE: loaded from a folder, or trained."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from gptj_train.data import unused_rows
from gptj_train.data.chat_template import template_in
from gptj_train.data.fast_bpe import FastBPE
from gptj_train.data.tokenizer_files import write_tokenizer_files
from gptj_train.data.tokenizer_folder import EOS_TOKEN, byte_level, load_backend
from gptj_train.data.unused_rows import AddedToken
from gptj_train.errors import UserError
from gptj_train.near_name import near_name

_PROBE = "An old caf\u00e9,\n\u4e16\u754c \U0001f600\x00"


class Tokenizer:
    """A ``tokenizers`` tokenizer with an EOS token, which ends every document.

    Attributes:
        eos_token: the EOS token, "<|endoftext|>" in GPT-J.
        eos_id: its id.
        chat_template: in Jinja; None if the tokenizer has none.
    """

    chat_template: str | None = None

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
            tokenizer = cls(*load_backend(path))
            tokenizer.chat_template = template_in(path if path.is_dir() else path.parent)
            # Some have no id for what they do not know, and would fail in the middle of the data.
            tokenizer.encode(_PROBE)
            return tokenizer
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the backend raises plain Exceptions, and its panics are BaseExceptions
            wanted = "give a tokenizer.json, a folder that holds one, or vocab.json + merges.txt"
            raise UserError(f"tokenizer {path}: {near_name(path)}{error}; {wanted}") from None

    @classmethod
    def choose(cls, path: str | None, init_from: str | None) -> Tokenizer:
        """Load the tokenizer at ``path``, or else the one in the folder of the initial weights."""
        found = path or init_from
        if found is None:
            raise UserError("tokenizer is missing: give tokenizer=FOLDER, or init_from=FOLDER with one inside")
        return cls.load(found)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()) -> Tokenizer:
        """Train a byte-level BPE of at most ``vocab_size`` entries; the EOS token has id 0, others follow it."""
        backend = byte_level(models.BPE())
        backend.add_special_tokens([EOS_TOKEN])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS_TOKEN, *special_tokens],
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
        extended = Tokenizer(backend, self.eos_token)
        extended.chat_template = self.chat_template
        return extended, mean_rows

    def pad_id(self, rows: int) -> int:
        """Return the id of the padding token: the last unused row of the embedding, or EOS if all are used."""
        unused = unused_rows.pad_row(self._backend, rows)
        return self.eos_id if unused is None else unused

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    @property
    def largest_id(self) -> int:
        return max(self._backend.get_vocab().values())

    def gives_ids_of(self, other: Tokenizer) -> bool:
        """Return whether every text of the other tokenizer's tokens has the same ids here; more tokens may follow."""
        mine, others = json.loads(self.to_json())["model"], json.loads(other.to_json())["model"]
        if mine.get("merges") != others.get("merges") or self.eos_id != other.eos_id:
            return False
        vocabulary = self._backend.get_vocab()
        for token, number in other._backend.get_vocab().items():
            # Names of unused rows: exports spell them out, the original tokenizer does not have them.
            if vocabulary.get(token) != number and not unused_rows.is_unused(token):
                return False
        return True

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

    def encode_texts(self, texts: list[str], *, special_tokens: bool = False) -> list[list[int]]:
        """Encode data on all cores.

        Args:
            special_tokens: text that spells a special token is that token; otherwise it is plain text.
        """
        if special_tokens:
            self._backend.encode_special_tokens = False
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        if self._fast_bpe is not None:
            # tiktoken fails on a few texts, such as a million spaces in a row.
            with contextlib.suppress(ValueError):
                return self._fast_bpe.encode_texts(texts)
        self._backend.encode_special_tokens = True
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

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

    def spelt_special_tokens(self, text: str) -> Counter[str]:
        """Count the special tokens that a text spells."""
        counts = Counter[str]()
        for start, tokens in self._special_by_start.items():
            # One search for all tokens with this start: most texts have none of the 144 of GPT-J's.
            if start in text:
                for token in tokens:
                    if found := text.count(token):
                        counts[token] = found
        return counts

    @cached_property
    def _special_by_start(self) -> dict[str, list[str]]:
        """Special tokens by their first two characters."""
        by_start: dict[str, list[str]] = {}
        for token in self.special_tokens:
            by_start.setdefault(token[:2], []).append(token)
        return by_start

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

    def save(
        self,
        folder: str | Path,
        rows: int | None = None,
        *,
        max_length: int | None = None,
        padding_side: str = "right",
    ) -> None:
        """Write the files from which Transformers and other readers load a tokenizer; see ``tokenizer_files``.

        The folder is created.

        Args:
            rows: of the model's embedding; each gets an entry, and the last unused one is the padding token. None:
                only the tokenizer's own entries, and no padding token.
            max_length: tokens that the model reads at most; None: unknown.
            padding_side: left for a model that generates, else right.

        Raises:
            OSError: a full disk.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # The setting is saved: Transformers should encode prompts as ``encode`` does.
        self._backend.encode_special_tokens = False
        backend = self._backend
        special_tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), self.eos_token)
        if rows is not None:
            backend = unused_rows.with_all_rows_named(backend, rows)
            special_tokens["pad_token"] = str(backend.id_to_token(self.pad_id(rows)))
        write_tokenizer_files(
            folder,
            backend,
            special_tokens,
            max_length=max_length,
            padding_side=padding_side,
            chat_template=self.chat_template,
        )
