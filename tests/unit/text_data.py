"""Configs with the values of configs/data/files.yaml, and files of records, for the tests of text data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from gptj_train.data.text_config import DataConfig

VALUES = yaml.safe_load((Path(__file__).parents[2] / "configs" / "data" / "files.yaml").read_text())


def text_data(**changes: Any) -> DataConfig:
    """The config of text; ``train`` is null unless it is given."""
    return DataConfig(**VALUES | {"train": None} | changes)


def jsonl(path: Path, *records: Any) -> Path:
    """Write a file of records; a string becomes ``{"text": ...}``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = [{"text": record} if isinstance(record, str) else record for record in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in whole))
    return path
