"""The text of a run: what is trained on, component by component, and what is held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gptj_train.counted import counted
from gptj_train.data.chat_template import DEFAULT, is_jinja, to_jinja, with_special_tokens
from gptj_train.data.files import find_files
from gptj_train.data.formats import describe, recognised, say
from gptj_train.data.held_out_share import HeldOutShare
from gptj_train.data.packed import Part, open_packing
from gptj_train.data.packing import LENGTHS, Method, Windows
from gptj_train.data.preparation import open_stores
from gptj_train.data.store import TokenStore
from gptj_train.data.text_config import DataConfig
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError

FORGETTING = "forgetting"
"""Name of the held-out set that is not part of ``data.validation``."""


@dataclass
class Split:
    """The windows of ``data.train``, ``data.validation`` or ``data.forgetting``.

    Attributes:
        windows: by component; a split that is not divided into components has a single entry with an empty name.
        skipped: reason -> number of bad records left out.
        unweighted: components that ``data.weights`` does not name, and that are left out for that reason.
        records: what is read of each record.
        special_tokens: special token -> how often the data spell it.
    """

    windows: dict[str, Windows]
    skipped: Counter[str]
    unweighted: list[str]
    records: str
    special_tokens: Counter[str]

    @property
    def documents(self) -> int:
        """Number of documents, of all components."""
        return sum(component.facts.documents for component in self.windows.values())

    def facts(self) -> Iterator[tuple[str, str]]:
        """Describe what was read and what was packed, as rows of a table that accounts for every token."""
        size = tokens = windows = positions = padding = 0
        for component in self.windows.values():
            size += component.facts.bytes
            tokens += component.facts.tokens
            windows += len(component)
            positions += len(component) * component.length
            padding += component.padding
        full = 1 - padding / max(positions, 1)
        dropped = _dropped_text(self.windows.values())
        packed = f"{counted(tokens, 'token')}{dropped} in {counted(windows, 'window')}, {full:.2%} full"
        without = f"; without {', '.join(self.unweighted)}, not in data.weights" if self.unweighted else ""
        yield "data", f"{counted(self.documents, 'document')}, {size / 1e6:,.1f} MB, {packed}{without}"
        yield "records", self.records
        if self.special_tokens:
            yield "special tokens", f"{_counted(self.special_tokens)} in the data"
        if self.skipped:
            yield (
                "skipped",
                ", ".join(f"{counted(count, 'record')}: {reason}" for reason, count in self.skipped.most_common()),
            )
        yield "bytes per token", f"{size / max(tokens, 1):.2f}"
        yield "tokens a document", self._document_lengths()
        if len(self.windows) > 1:
            yield "components", self._component_shares(tokens)

    def _document_lengths(self) -> str:
        """Write the histogram of document lengths; empty bins are left out."""
        counts = np.sum([component.facts.length_counts for component in self.windows.values()], axis=0)
        shares = []
        for number, count in enumerate(counts):
            if count:
                name = f"up to {LENGTHS[number]:,}" if number < len(LENGTHS) else f"above {LENGTHS[-1]:,}"
                shares.append(f"{name}: {count / counts.sum():.0%}")
        return ", ".join(shares)

    def _component_shares(self, tokens: int) -> str:
        """Write each component's share of the tokens, the largest first."""
        by_size = sorted(self.windows.items(), key=lambda item: -item[1].facts.tokens)
        return ", ".join(f"{name} {component.facts.tokens / tokens:.1%}" for name, component in by_size)


@dataclass
class TextData:
    """The prepared text of a run.

    Attributes:
        splits: ``train``, ``validation`` and ``forgetting``, as far as the config names files for them.
        weights: share of each component of ``train``; None: no mixture.
        isolate: the documents in a window neither see nor predict each other.
        chat_template: in Jinja, what the data was put into; None: it is no chats.
    """

    splits: dict[str, Split]
    weights: list[float] | None
    isolate: bool
    chat_template: str | None

    @property
    def train(self) -> Split:
        if "train" not in self.splits:
            raise UserError("data.train is null; give files to train on")
        return self.splits["train"]

    @property
    def held_out_fact(self) -> str:
        """Describe the validation split in a few words."""
        if "validation" not in self.splits:
            return "none"
        return dict(self.splits["validation"].facts())["data"]

    @property
    def held_out(self) -> dict[str, Windows]:
        """Held-out windows by component, including the forgetting set."""
        held_out: dict[str, Windows] = {}
        if "validation" in self.splits:
            held_out |= self.splits["validation"].windows
        if FORGETTING in self.splits:
            (windows,) = self.splits[FORGETTING].windows.values()
            held_out[FORGETTING] = windows
        return held_out


def prepare(data: DataConfig, tokenizer: Tokenizer, length: int, held_out: HeldOutShare | None = None) -> TextData:
    """Tokenize and pack all files of the config into windows of ``length`` tokens.

    Args:
        held_out: the part of ``data.train`` that becomes the validation split; None: training is not the purpose.

    Raises:
        UserError: see ``find_files`` and ``open_stores``; or a weight of a component that does not exist, or a split
            of which nothing can be packed.
    """
    if length < 2:
        raise UserError(f"sequence_length must be at least 2, got {length}")
    weights = list(data.weights.values()) if data.weights else None
    chat_template = None
    if held_out is not None:
        held_out.check(data.validation)
    # All files are found before any is read: a wrong path should not show up after an hour of tokenizing.
    files = _find_all_files(data)
    splits = {}
    for name, found in files.items():
        # Each split has a format of its own: text to remember may stand beside chats to train on.
        split_data = recognised(data, found, f"data.{name}")
        if split_data.kind == "chat":
            split_data, chat_template = _with_chat_template(split_data, tokenizer)
        stores = open_stores(found, split_data, tokenizer)
        known = component_names(stores)
        part = None
        if name == "validation":
            _check_component_names(known, "data.validation")
        if name == "train" and held_out is not None and held_out.share is not None:
            _check_component_names(known, "data.train")
            part = Part(held_out, held=False)
            # Of a mixture only what is learned is held out.
            components = list(data.weights or known)
            validation = _pack(
                stores, split_data, tokenizer, length=length, components=components, part=Part(held_out, held=True)
            )
            _check_not_empty("validation", validation, known)
            # Skipped records and special tokens are counted once, with the training part.
            splits["validation"] = replace(validation, skipped=Counter(), special_tokens=Counter())
        if name == "train":
            components = list(data.weights or ())
        elif name == "validation":
            components = known
        else:
            components = []
        splits[name] = _pack(stores, split_data, tokenizer, length=length, components=components, part=part)
        _check_not_empty(name, splits[name], known)
        if part is not None:
            part.rule.announce(splits["validation"].documents, splits["train"].documents)
        if splits[name].special_tokens:
            how = "their single ids" if data.special_tokens == "tokens" else "plain text"
            other = "text" if data.special_tokens == "tokens" else "tokens"
            counts = _counted(splits[name].special_tokens)
            say(f"data.{name}: spells special tokens, read as {how} ({counts}); data.special_tokens={other} changes it")
    if held_out is not None:
        held_out.warn_if_none(data.validation)
    return TextData(splits, weights, data.isolate, chat_template)


def _check_component_names(names: list[str], key: str) -> None:
    if FORGETTING in names:
        raise UserError(f"{key}: no component can be named {FORGETTING!r}; give it as data.forgetting")


def _with_chat_template(data: DataConfig, tokenizer: Tokenizer) -> tuple[DataConfig, str]:
    """Choose the chat template: the config's, else the tokenizer's own, else the default.

    Returns:
        The config with the template to read chats by, and the template in Jinja for the export.
    """
    template = data.chat_template or tokenizer.chat_template or DEFAULT
    exported = to_jinja(template)
    if is_jinja(template):
        template = with_special_tokens(template, tokenizer.eos_token, list(tokenizer.special_tokens))
    return replace(data, chat_template=template), exported


def component_names(stores: list[TokenStore]) -> list[str]:
    """Return the names of all components, in the order of their first documents."""
    names: dict[str, None] = {}  # a dict keeps the order, a set does not
    for store in stores:
        names |= dict.fromkeys(store.names)
    return list(names)


def _find_all_files(data: DataConfig) -> dict[str, list[Path]]:
    files = {}
    if data.train is not None:
        files["train"] = find_files(data.train, "data.train")
    if data.validation:
        files["validation"] = find_files(data.validation, "data.validation")
    if data.forgetting:
        files[FORGETTING] = find_files(data.forgetting, "data.forgetting")
    return files


def _pack(
    stores: list[TokenStore],
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    length: int,
    components: list[str],
    part: Part | None,
) -> Split:
    """Pack each of the components into its own windows; without components, everything together.

    Args:
        part: side of the held-out share; None packs all documents.
    """
    method: Method = "contiguous" if data.packing == "contiguous" else "text"
    if data.has_examples:
        # Prompts and chats are always packed whole: a window that begins in a response lacks the prompt.
        method = "examples"
    windows: dict[str, Windows] = {}
    for name in components or [""]:
        packing = open_packing(
            stores, name or None, cache=Path(data.cache_dir), method=method, length=length, part=part
        )
        windows[name] = Windows(stores, packing, length=length, fill=tokenizer.eos_id)
    skipped = Counter[str]()
    special_tokens = Counter[str]()
    for store in stores:
        skipped.update(store.skipped)
        special_tokens.update(store.special_tokens)
    unweighted = []
    if components:
        unweighted = [name for name in component_names(stores) if name not in components]
    return Split(windows, skipped, unweighted, records=describe(data), special_tokens=special_tokens)


def _check_not_empty(name: str, split: Split, known: list[str]) -> None:
    empty = [component for component, windows in split.windows.items() if len(windows) == 0]
    # A held-out component may be empty: it has no curve. A component with a weight may not: it would be sampled.
    if not empty or (name != "train" and len(empty) < len(split.windows)):
        return
    what = ", ".join(empty) or "all of it"  # the only component has no name
    raise UserError(
        f"data.{name}: nothing to pack of {what}{_dropped_text(split.windows.values())}; "
        f"the components are {', '.join(sorted(known))}"
    )


def _counted(special_tokens: Counter[str]) -> str:
    """Write how often the most frequent tokens occur."""
    return ", ".join(f"{count:,} x {token}" for token, count in special_tokens.most_common(5))


def _dropped_text(components: Iterable[Windows]) -> str:
    """Write the dropped tokens by reason, each preceded by a comma; nothing where none are dropped."""
    dropped = Counter[str]()
    for windows in components:
        dropped.update(windows.facts.dropped)
    return "".join(f", {count:,} dropped ({reason})" for reason, count in dropped.items() if count)
