"""Hold out a share of the training data, by document, where there are no validation files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from gptj_train.counted import counted
from gptj_train.data.formats import say
from gptj_train.errors import UserError
from gptj_train.schema import schema

T = TypeVar("T")

_NOTHING_HELD_OUT = (
    "no data.validation: nothing will show over-fitting; give held-out files, or validation_share=0.02 to hold out a "
    "part of data.train"
)


@schema
class HeldOutKeys:
    """The key of the held-out share, and the seed that draws it."""

    seed: int
    validation_share: float | None

    @property
    def held_out(self) -> HeldOutShare:
        return HeldOutShare(self.validation_share, self.seed)


@dataclass(frozen=True)
class HeldOutShare:
    """The rule that divides the documents of ``data.train`` into a training part and a held-out part.

    A document's side depends on its content, the seed and the share alone: neither the number of ranks nor the order of
    the files changes it, and copies of a document share a side.

    Attributes:
        share: of the documents; None holds out none.

    Raises:
        UserError: a share outside (0, 1).
    """

    share: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share < 1:
            raise UserError(
                f"validation_share must be above 0 and below 1, such as 0.02, or null for none, got {self.share}"
            )

    def check(self, validation: str | list[str] | None) -> None:
        """Refuse a share beside validation files.

        Args:
            validation: the value of ``data.validation``.

        Raises:
            UserError: both are given.
        """
        if self.share is not None and validation:
            raise UserError(
                f"validation_share={self.share:g} and data.validation={validation} both say what is held out; give one "
                "of them, such as data.validation=null"
            )

    def warn_if_none(self, validation: str | list[str] | None) -> None:
        """Print a line if there are neither validation files nor a share."""
        if self.share is None and not validation:
            say(_NOTHING_HELD_OUT)

    def divide(self, records: list[T], content: Callable[[T], str], noun: str) -> tuple[list[T], list[T]]:
        """Return the records to train on and those to hold out; without a share, all of them and none, with a warning.

        Args:
            content: returns the text of a record; all records of one text share a side.
            noun: what to call one of them in messages.

        Raises:
            UserError: as ``split``.
        """
        if self.share is None:
            say(_NOTHING_HELD_OUT)
            return records, []
        hashes = [hash_number(content_hasher(content(record))) for record in records]
        mask = self.split(np.array(hashes, dtype=np.uint64), noun)
        held_out = int(mask.sum())
        self.announce(held_out, len(records) - held_out, noun)
        train: list[T] = []
        held: list[T] = []
        for record, is_held in zip(records, mask, strict=True):
            (held if is_held else train).append(record)
        return train, held

    def split(self, hashes: np.ndarray, noun: str = "document") -> np.ndarray:
        """Return a mask (D) bool of the documents to hold out.

        Args:
            hashes: (D) uint64, ``hash_number`` of each document.
            noun: what to call one of them in messages.

        Raises:
            UserError: fewer than two different documents.
        """
        assert self.share is not None
        # By distinct content: a copy of a held-out document in the training part would flatter the evaluation.
        distinct, content_of = np.unique(hashes, return_inverse=True)
        if len(distinct) < 2:
            raise UserError(
                f"validation_share={self.share:g}: data.train holds a single {noun}, which cannot be divided (a .txt "
                "file is one document); give held-out text as data.validation=FILE, or write .jsonl with a text a line"
            )
        count = round(self.share * len(distinct))
        count = min(max(count, 1), len(distinct) - 1)  # neither part may be empty
        # The smallest of seeded random numbers: an exact share, and most documents keep their side if some are added.
        drawn = np.argsort(_mixed(distinct, self.seed), kind="stable")[:count]
        is_drawn = np.zeros(len(distinct), dtype=bool)
        is_drawn[drawn] = True
        mask: np.ndarray = is_drawn[content_of.reshape(-1)]
        return mask

    def announce(self, held: int, others: int, noun: str = "document") -> None:
        """Print how many documents are held out."""
        total = held + others
        say(
            f"held out: {held:,} of {counted(total, noun)} of data.train, {held / total:.1%} "
            f"(validation_share={self.share:g}, seed={self.seed})"
        )


def content_hasher(text: str = "") -> hashlib.blake2b:
    """Return a hasher of a document's text, whose digest is the same on every machine and in every process."""
    return hashlib.blake2b(text.encode(), digest_size=8)


def hash_number(hasher: hashlib.blake2b) -> int:
    """Return the digest of a ``content_hasher`` as a number of 64 bits."""
    return int.from_bytes(hasher.digest(), "little")


def _mixed(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Return a random uint64 for each hash, another for each seed, by the finalizer of splitmix64.

    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014.
    """
    # Wraps around at 2**64, as it should.
    offset = np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    numbers = hashes.astype(np.uint64) + offset
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = numbers ^ (numbers >> np.uint64(31))
    return mixed
