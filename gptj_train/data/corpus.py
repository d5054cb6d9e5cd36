"""The text of a run: what is trained on, component by component, and what is held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gptj_train.data.files import find_files
from gptj_train.data.packing import BestFitWindows, ContiguousWindows, Documents, Windows
from gptj_train.data.preparation import open_stores
from gptj_train.data.sources import DataConfig
from gptj_train.data.store import TokenStore
from gptj_train.data.tokenizer import Tokenizer

FORGETTING = "forgetting"
"""Name of the held-out set that is no part of ``data.validation``."""

_LENGTHS = (2**4, 2**6, 2**8, 2**10, 2**12, 2**14)


@dataclass
class Part:
    """Windows of some files, by component; one under the empty name where components are not told apart."""

    windows: dict[str, Windows]
    skipped: Counter[str]

    def facts(self) -> Iterator[tuple[str, str]]:
        """What went in and what came out, as lines of a table that accounts for every token."""
        of_all = list(self.windows.values())
        documents, size = sum(len(w.documents) for w in of_all), sum(w.documents.bytes for w in of_all)
        tokens, windows = sum(w.tokens for w in of_all), sum(len(w) for w in of_all)
        dropped = sum((w.dropped for w in of_all), Counter[str]())
        places = sum(len(w) * w.length for w in of_all)
        lost = "".join(f", {count:,} dropped ({reason})" for reason, count in dropped.items() if count)
        full = (tokens - dropped.total()) / max(places, 1)
        packed = f"{tokens:,} tokens{lost} in {windows:,} windows, {full:.2%} full"
        yield "data", f"{documents:,} documents, {size / 1e6:,.1f} MB, {packed}"
        if self.skipped:
            yield "skipped", ", ".join(f"{count:,} records: {reason}" for reason, count in self.skipped.most_common())
        lengths = np.concatenate([w.documents.lengths for w in of_all])
        yield "bytes per token", f"{size / max(tokens, 1):.2f}"
        counts = np.histogram(lengths, bins=(0, *_LENGTHS, np.inf))[0]
        names = [*(f"up to {length:,}" for length in _LENGTHS), f"above {_LENGTHS[-1]:,}"]
        shown = (f"{name}: {count / documents:.0%}" for name, count in zip(names, counts, strict=True) if count)
        yield "tokens a document", ", ".join(shown)
        if len(self.windows) > 1:
            shares = ((name, w.tokens / tokens) for name, w in self.windows.items())
            yield "components", ", ".join(f"{name} {share:.1%}" for name, share in sorted(shares, key=lambda p: -p[1]))


@dataclass
class TextData:
    """What ``prepare`` found: parts by name, ``train`` unless only held-out data were asked for.

    ``weights`` has a share for each component of ``train``, or is None.
    """

    parts: dict[str, Part]
    weights: list[float] | None

    @property
    def train(self) -> Part:
        if "train" not in self.parts:
            raise ValueError("data.train is null; give files to train on")
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
        ValueError: see ``find_files`` and ``open_stores``; or weights of components that are not there.
    """
    if not 2 <= length < 2**16:
        raise ValueError(f"sequence_length must be from 2 to {2**16 - 1} tokens, got {length}")
    paths = {"train": data.train, "validation": data.validation, FORGETTING: data.forgetting}
    files = {name: find_files(given, f"data.{name}") for name, given in paths.items() if given is not None}
    parts = {}
    for name, found in files.items():
        stores = open_stores(found, data, tokenizer)
        components = {"train": list(data.weights or ()), "validation": component_names(stores)}.get(name)
        parts[name] = _part(stores, data, tokenizer, length, components)
        if empty := [component for component, windows in parts[name].windows.items() if not len(windows)]:
            known = ", ".join(sorted(component_names(stores)))
            raise ValueError(f"data.{name}: nothing to pack of {', '.join(empty) or 'all of it'}; there are {known}")
    return TextData(parts, list(data.weights.values()) if data.weights else None)


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
    return Part(windows, sum((Counter(store.skipped) for store in stores), Counter()))
