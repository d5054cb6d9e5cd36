"""A training checkpoint as an HF folder, by one process without GPU or process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from gptj_train.data.tokenizer import Tokenizer
from gptj_train.data.unused_rows import AddedToken
from gptj_train.errors import UserError
from gptj_train.export.adapters import MergedWeights
from gptj_train.export.from_engine import progress, prompt_ids, write_export_report, write_verified
from gptj_train.export.model_card import model_card
from gptj_train.export.verify import streamed_logits
from gptj_train.model.auto import class_of
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.training.model_files import ModelFiles
from gptj_train.training.retention import newest_whole
from gptj_train.weights.checkpoint_weights import CheckpointWeights, open_weights
from gptj_train.weights.hf_writer import DTYPES
from gptj_train.weights.manifest import Manifest
from gptj_train.weights.mean_rows import WithMeanRows
from gptj_train.weights.stored import StoredWeights, is_adapter


def export_checkpoint(run: str | Path, folder: str | Path | None, dtype: str) -> Path:
    """Write what a run would export had it ended at a checkpoint; a parameter or a block is in memory at a time.

    Args:
        run: a run folder, whose newest whole checkpoint is taken, or a ``step_...`` folder.
        folder: to write, which must not be there or be empty; None: ``export`` in the run folder, anew.
        dtype: bf16, fp16 or fp32.

    Raises:
        UserError: no whole checkpoint there, of LoRA no weights that it began from, or a folder with something in it.
        ExportError: a check of what was written failed; no folder is left.
    """
    step = newest_whole(run).resolve()
    run_folder = step.parent.parent
    if folder is None and step.parent.name != "checkpoints":
        raise UserError(f"{step} is in no run's checkpoints; say where to write by output_dir=...")
    target = run_folder / "export" if folder is None else _empty(Path(folder).absolute())
    config = GPTJConfig.from_pretrained(step)
    kind = class_of(step)
    model_files = ModelFiles(config, kind.__name__, Tokenizer.load(step))
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in kind(config).named_parameters()}
    settings = _settings(run_folder)
    facts = progress(run_folder, settings.get("init_from"), Manifest.read(step).state["step"])
    with _weights(step, settings) as weights:
        weights.match(shapes)
        expected, _ = streamed_logits(weights, config, prompt_ids(config))
        rows = shapes.get("lm_head.weight", shapes.get("qa_outputs.weight"))
        tensors = ((name, weights.tensor(name)) for name in shapes)
        card = model_card(kind.__name__, facts)
        # Where the head speaks of the whole text, its last token's answer is the model's.
        report = write_verified(
            target, tensors, shapes, DTYPES[dtype], model_files, card, expected if rows else expected[-1:]
        )
    write_export_report(target, report | {"architecture": kind.__name__, "run": facts, "checkpoint": step.name})
    return target


def _empty(folder: Path) -> Path:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"output_dir={folder} is there already; give another one, or remove it")
    return folder


def _settings(run_folder: Path) -> dict[str, Any]:
    """The run's config.yaml, of which only values are used."""
    path = run_folder / "config.yaml"
    values = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    assert isinstance(values, dict)
    return values  # type: ignore[return-value]


def _weights(step: Path, settings: dict[str, Any]) -> StoredWeights:
    trained = CheckpointWeights(step)
    if not any(map(is_adapter, trained.names())):
        return trained
    base = settings.get("init_from")
    if base is None:
        raise UserError(f"{step} holds LoRA adapters alone, and {step.parent.parent}/config.yaml names no init_from")
    lora, tokenizer = settings["lora"], Tokenizer.choose(settings["tokenizer"], base)
    words = map(AddedToken.parse, settings["add_tokens"])
    _, rows = tokenizer.with_added_tokens(words, GPTJConfig.from_pretrained(base).vocab_size)
    frozen = WithMeanRows(open_weights(base), rows)
    return MergedWeights(frozen, trained, lora["alpha"] / lora["rank"], DTYPES[settings["engine"]["precision"]])
