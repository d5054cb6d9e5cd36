"""What decides the batches of a run, by name: a checkpoint stores it, so that a refused resume can say what differs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptj_train.data.files import local_files

_SETTINGS = ("seed", "global_batch_size", "sequence_length", "add_tokens")
# Keys of the data group that do not change what is trained on.
_WITHOUT_EFFECT = ("train", "validation", "forgetting", "cache_dir", "max_bad_share")
# Bytes at either end of a file that are hashed. Hashing terabytes at every start would take too long: a change
# between the ends that keeps the size is found by the hash of the next batch, but not named.
_HASHED = 2**16


def data_identity(config: Mapping[str, Any], tokenizer: str) -> dict[str, Any]:
    """Return names and values, as they come back from JSON.

    Args:
        config: a fine-tuning config, its groups as dictionaries.
        tokenizer: digest of the tokenizer.
    """
    identity = {name: config[name] for name in _SETTINGS}
    identity["tokenizer"] = tokenizer[:12]
    for name, value in config["data"].items():
        if name not in _WITHOUT_EFFECT:
            identity[f"data.{name}"] = value
    # Language modeling has no settings of its task.
    for name, value in config.get("task", {}).items():
        identity[f"task.{name}"] = value
    for file in local_files(config["data"].get("train"), "data.train"):
        identity[f"file {file}"] = _describe(file)
    result: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return result


def _describe(file: Path) -> str:
    """Return the size of a file and a hash of its ends."""
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            digest = hashlib.sha256(opened.read(_HASHED))
            opened.seek(max(0, size - _HASHED))
            digest.update(opened.read(_HASHED))
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return f"{size:,} bytes, sha256 {digest.hexdigest()[:8]}"
