"""Data configs and stores for the tests of the data room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptj_train.data.sources import DataConfig, Segment, read_segments

DEFAULTS: dict[str, Any] = {
    "train": None,
    "validation": None,
    "forgetting": None,
    "kind": "text",
    "text_field": "text",
    "prompt_field": "prompt",
    "response_field": "response",
    "messages_field": "messages",
    "chat_template": "### {role}\n{content}\n\n",
    "component_field": "meta.pile_set_name",
    "weights": None,
    "packing": "contiguous",
    "isolate": True,
    "bad_records": "error",
    "max_bad_share": 0.01,
    "cache_dir": "cache",
}


def data_config(**changes: Any) -> DataConfig:
    return DataConfig(**DEFAULTS | changes)


def segments_of(file: Path, skipped: Counter[str] | None = None, **changes: Any) -> list[Segment]:
    counted: Counter[str] = Counter() if skipped is None else skipped
    return list(read_segments(file, data_config(**changes), counted, lambda read: None))


class FakeStore:
    """Documents in memory, as a TokenStore holds them; flags say what is to be predicted."""

    def __init__(
        self, documents: Sequence[Sequence[int]], flags: Sequence[Sequence[bool]] | None = None, component: str = "c"
    ) -> None:
        self.tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
        self.targets = None if flags is None else np.array([flag for own in flags for flag in own], dtype=bool)
        self.ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
        self.bytes = np.array([3 * len(document) for document in documents], dtype=np.int64)
        self.components = np.zeros(len(documents), dtype=np.uint16)
        self.names, self.skipped = [component], {}
