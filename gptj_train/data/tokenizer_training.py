"""Train a tokenizer on files of text, the same files and records that a model trains on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptj_train.counted import counted
from gptj_train.data.files import find_files
from gptj_train.data.formats import recognised
from gptj_train.data.sources import read_segments
from gptj_train.data.text_config import DataConfig
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError


def train_tokenizer(
    data: DataConfig, *, vocab_size: int, special_tokens: Sequence[str], max_megabytes: float
) -> tuple[Tokenizer, str]:
    """Train a byte-level BPE on ``data.train``.

    Args:
        max_megabytes: of text; what follows is left out.

    Returns:
        The tokenizer, and a line that describes it.

    Raises:
        UserError: no files, a bad record, or a text that is too small for ``vocab_size``.
    """
    if data.train is None:
        raise UserError("data.train is null; give files to learn from")
    files = find_files(data.train, "data.train")
    sample = _Sample(recognised(data, files, "data.train"), files, int(max_megabytes * 1e6))
    tokenizer = Tokenizer.train(sample.texts(), vocab_size, special_tokens)
    entries = len(tokenizer)
    size = f"{sample.used / 1e6:.1f} MB" if sample.used >= 1e5 else f"{sample.used / 1e3:.1f} kB"
    facts = f"tokenizer of {entries:,} entries from {size} of text"
    if sample.cut_off:
        facts += f" (the first; more was left out by max_megabytes={max_megabytes:g})"
    if entries < vocab_size:
        facts += f", fewer than vocab_size={vocab_size}: the text has no more pairs to merge"
    if sample.skipped:
        facts += f"; {counted(sample.skipped.total(), 'bad record')} skipped"
    if sample.used == 0:
        raise UserError(f"data.train: no text in {data.train}; give files with text")
    return tokenizer, facts


class _Sample:
    """The text of some files, up to a limit.

    Attributes:
        used: bytes that were read.
        cut_off: whether there was more text than the limit.
        skipped: reason -> number of bad records.
    """

    def __init__(self, data: DataConfig, files: Sequence[Path], limit: int) -> None:
        self._data, self._files, self._limit = data, files, limit
        self.used = 0
        self.cut_off = False
        self.skipped: Counter[str] = Counter()

    def texts(self) -> Iterator[str]:
        for file in self._files:
            for segment in read_segments(file, self._data, skipped=self.skipped, progress=lambda _: None):
                if self.used >= self._limit:
                    self.cut_off = True
                    return
                # A template is the same in each message: its share of the text says nothing about words.
                if not segment.template:
                    self.used += len(segment.text.encode())
                    yield segment.text
