"""Collect what a model card says: from metrics.jsonl, and from the config and card of the base model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gptj_train.counted import counted
from gptj_train.export.model_card import CardFacts
from gptj_train.metrics_file import read_metrics, results_of

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_HUB_DATASET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@[^/]*)?/")


def progress(run: Path, base: str | None, until: int | None = None) -> dict[str, str]:
    """Return facts about a run's training from its metrics.jsonl: its start, last step and last evaluation.

    Args:
        base: the folder that it started from.
        until: ignore later steps.
    """
    step, evaluation = _last_lines(run, until)
    facts = {"start": "random weights" if base is None else Path(base).name}
    if step:
        facts["training"] = (
            f"{counted(step['step'], 'step')}, {counted(step['tokens'], 'token')}, loss {step['loss']:.4f}"
        )
    for name, value in results_of(evaluation).items():
        facts[name.replace("_", " ")] = f"{value:.4f}"
    return facts


def card_facts(
    table: Mapping[str, str],
    *,
    run: Path,
    base: str | None,
    chat: bool,
    until: int | None = None,
    adapter: bool = False,
) -> CardFacts:
    """Return the facts of a model card.

    Args:
        table: facts about data, training and evaluation, by short name.
        run: the run folder.
        base: the folder or hub id that the run started from.
        chat: the tokenizer has a chat template.
        until: ignore later steps.
        adapter: the card is that of LoRA adapters.
    """
    _, evaluation = _last_lines(run, until)
    front_matter = _front_matter(base)
    return CardFacts(
        table=table,
        base=_name_of(base),
        license=_text(front_matter.get("license")),
        language=_text(front_matter.get("language")),
        datasets=_datasets(run),
        results=results_of(evaluation),
        chat=chat,
        adapter=adapter,
    )


def _datasets(run: Path) -> tuple[str, ...]:
    """Return the hub's names of a run's training data. Files of this machine have no name there."""
    try:
        data = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return ()
    if not isinstance(data, dict):
        return ()
    train = data.get("train") or []
    places = [train] if isinstance(train, str) else list(train)
    names = [data["dataset"]] if isinstance(data.get("dataset"), str) else []
    for place in places:
        found = _HUB_DATASET.match(str(place))
        if found and found[1] not in names:
            names.append(found[1])
    return tuple(names)


def base_path(base: str | None) -> str | None:
    """Return where PEFT finds a base model: a folder's absolute path, or a hub id as it is."""
    return base if base is None or _is_hub_id(base) else str(Path(base).absolute())


def _last_lines(run: Path, until: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the last train line with a loss and the last eval line, {} where there is none."""
    step: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    for line in read_metrics(run):
        if until is not None and line["step"] > until:
            continue
        # A skipped step has a null loss.
        if line.get("loss") is not None:
            step = line
        if line["kind"] == "eval":
            evaluation = line
    return step, evaluation


def _name_of(base: str | None) -> str | None:
    """Return a base model's hub id if its config.json knows it, else the folder's name: a path is private."""
    if base is None or _is_hub_id(base):
        return base
    try:
        name = json.loads((Path(base) / "config.json").read_text()).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        name = None
    return name if isinstance(name, str) and _is_hub_id(name) else Path(base).absolute().name


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _front_matter(base: str | None) -> dict[str, Any]:
    """Return the metadata of the base's model card; {} without a readable one."""
    if base is None or not (Path(base) / "README.md").is_file():
        return {}
    try:
        _, text, _ = (Path(base) / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        values = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _text(value: Any) -> str | None:
    # The hub allows a list of languages.
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else None
