"""The text of a run: what is trained on, component by component, and what is held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from gptj_train.data.files import find_files
from gptj_train.data.packing import BestFitWindows, ContiguousWindows, Documents, Windows
from gptj_train.data.preparation import open_stores
from gptj_train.data.sources import DataConfig
from gptj_train.data.store import TokenStore
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError

FORGETTING = "forgetting"
"""Name of the held-out set that is no part of ``data.validation``."""

_LENGTHS = (2**4, 2**6, 2**8, 2**10, 2**12, 2**14)


@dataclass
class Part:
    """Windows of some files, by component; one under the empty name where components are not told apart."""

    windows: dict[str, Windows]
    skipped: Counter[str]
    left_out: list[str]  # components that the weights do not name

    def facts(self) -> Iterator[tuple[str, str]]:
        """What went in and what came out, as lines of a table that accounts for every token."""
        of_all = list(self.windows.values())
        documents, size = sum(len(w.documents) for w in of_all), sum(w.documents.bytes for w in of_all)
        tokens, windows = sum(w.tokens for w in of_all), sum(len(w) for w in of_all)
        places = sum(len(w) * w.length for w in of_all)
        full = 1 - sum(w.padding for w in of_all) / max(places, 1)
        packed = f"{tokens:,} tokens{_lost(of_all)} in {windows:,} windows, {full:.2%} full"
        without = f"; without {', '.join(self.left_out)}, not in data.weights" if self.left_out else ""
        yield "data", f"{documents:,} documents, {size / 1e6:,.1f} MB, {packed}{without}"
        if self.skipped:
            yield "skipped", ", ".join(f"{count:,} records: {reason}" for reason, count in self.skipped.most_common())
        lengths = np.concatenate([w.documents.lengths for w in of_all])
        yield "bytes per token", f"{size / max(tokens, 1):.2f}"
        counts = np.bincount(np.searchsorted(_LENGTHS, lengths), minlength=len(_LENGTHS) + 1)
        names = [*(f"up to {length:,}" for length in _LENGTHS), f"above {_LENGTHS[-1]:,}"]
        shown = (f"{name}: {count / documents:.0%}" for name, count in zip(names, counts, strict=True) if count)
        yield "tokens a document", ", ".join(shown)
        if len(self.windows) > 1:
            shares = ((name, w.tokens / tokens) for name, w in self.windows.items())
            yield "components", ", ".join(f"{name} {share:.1%}" for name, share in sorted(shares, key=lambda p: -p[1]))


@dataclass
class TextData:
    """What ``prepare`` found: parts by name, ``train`` unless only held-out data were asked for.

    ``weights`` has a share for each component of ``train``, or is None. With ``isolate`` the documents of a window
    neither see nor predict each other.
    """

    parts: dict[str, Part]
    weights: list[float] | None
    isolate: bool

    @property
    def train(self) -> Part:
        if "train" not in self.parts:
            raise UserError("data.train is null; give files to train on")
        return self.parts["train"]

    @property
    def held_out(self) -> dict[str, Windows]:
        """Held-out windows by component, the forgetting set among them."""
        found = dict(self.parts["validation"].windows) if "validation" in self.parts else {}
        for windows in self.parts[FORGETTING].windows.values() if FORGETTING in self.parts else ():
            found[FORGETTING] = windows
        return found


def prepare(data: DataConfig, tokenizer: Tokenizer, length: int) -> TextData:
    """Training and held-out windows of ``length`` tokens; the files are all looked for before any is read.

    Raises:
        UserError: see ``find_files`` and ``open_stores``; or weights of components that are not there.
    """
    if length < 2:
        raise UserError(f"sequence_length must be at least 2, got {length}")
    paths = {"train": data.train, "validation": data.validation or None, FORGETTING: data.forgetting or None}
    files = {name: find_files(given, f"data.{name}") for name, given in paths.items() if given is not None}
    parts = {}
    for name, found in files.items():
        stores = open_stores(found, data, tokenizer)
        components = {"train": list(data.weights or ()), "validation": component_names(stores)}.get(name)
        if name == "validation" and FORGETTING in component_names(stores):
            raise UserError(f"data.validation: no component can be named {FORGETTING!r}; give it as data.forgetting")
        parts[name] = part = _part(stores, data, tokenizer, length, components)
        empty = [component for component, windows in part.windows.items() if not len(windows)]
        # Held out, a component of few documents may have nothing; but what the weights name must be there.
        if empty and (name == "train" or len(empty) == len(part.windows)):
            known = ", ".join(sorted(component_names(stores)))
            what = (", ".join(empty) or "all of it") + _lost(part.windows.values())
            raise UserError(f"data.{name}: nothing to pack of {what}; there are {known}")
    return TextData(parts, list(data.weights.values()) if data.weights else None, data.isolate)


def _lost(of_all: Iterable[Windows]) -> str:
    dropped = sum((windows.dropped for windows in of_all), Counter[str]())
    return "".join(f", {count:,} dropped ({reason})" for reason, count in dropped.items() if count)


def component_names(stores: list[TokenStore]) -> list[str]:
    """Of all components, in the order of their first document."""
    return list(dict.fromkeys(name for store in stores for name in store.names))


def _part(
    stores: list[TokenStore], data: DataConfig, tokenizer: Tokenizer, length: int, components: list[str] | None
) -> Part:
    """Windows over stores, for each of some components; None does not tell them apart."""
    windows: dict[str, Windows] = {}
    for name in components or [""]:
        documents = Documents(stores, name or None)
        if data.kind == "text" and data.packing == "contiguous":
            windows[name] = ContiguousWindows(documents, length, tokenizer.end_id)
        else:
            windows[name] = BestFitWindows(documents, length, tokenizer.end_id, supervised=data.kind != "text")
    left_out = [name for name in component_names(stores) if components and name not in components]
    return Part(windows, sum((Counter(store.skipped) for store in stores), Counter()), left_out)
