"""Read and write metrics.jsonl, a run's record: one JSON object a line, for each step and each evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_COUNTERS = ("kind", "step", "epoch", "time", "tokens", "memory_gib")  # no results of an evaluation


def ends_with_newline(path: Path) -> bool:
    """Return whether a file is absent, empty, or ends with a whole line."""
    return not path.exists() or (path.is_file() and path.read_bytes()[-1:] in (b"\n", b""))


def metrics_line(metrics: Mapping[str, Any]) -> str:
    """Return metrics as a line of JSON, with null for NaN and infinity."""
    return json.dumps(_without_nan(metrics), allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, with null."""
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def results_of(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Return the numeric results in an eval line of metrics.jsonl, without its counters."""
    results = {}
    for name, value in evaluation.items():
        if isinstance(value, float) and name not in _COUNTERS:
            results[name] = value
    return results


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, without those that cannot be read; [] if there is no file.

    The file is a record, not state: a flipped bit in it costs a line, never a run. Lines of version 0.1 get the names
    of today. Their ``tokens`` stay what they were: terms of the loss.
    """
    lines, _ = read_lines(Path(folder) / "metrics.jsonl")
    return lines


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the good lines of a metrics.jsonl, and how many others there are; a crash may cut off the last one."""
    if not path.is_file():
        # A pipe of this name would never end: it counts as one bad line, so that a file replaces it.
        return [], int(path.exists())
    lines, bad = [], 0
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # ValueError: no JSON, or no UTF-8
            bad += 1
            continue
        if _is_record(line):
            if "memory" in line:
                line["memory_gib"] = line.pop("memory")
            line.setdefault("kind", "eval" if "eval_loss" in line else "train")
            lines.append(line)
        else:
            bad += 1
    return lines, bad


def _is_record(line: Any) -> bool:
    if not isinstance(line, dict) or type(line.get("step")) is not int or type(line.get("tokens", 0)) is not int:
        return False
    is_training = "loss" in line
    numbers = ("loss", "lr", "grad_norm", "skipped_steps") if is_training else ("eval_loss",)
    return all(isinstance(line.get(name), int | float | None) for name in numbers)
