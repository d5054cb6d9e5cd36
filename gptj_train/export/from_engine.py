"""The trained model as an HF folder, from the fp32 master weights: written, read again, checked, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptj_train.export.adapters import save_adapter
from gptj_train.export.model_card import model_card
from gptj_train.export.verify import ExportError, check_logits, verify_folder
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.lora import LoraConfig, merged
from gptj_train.tracking import read_metrics, results_of
from gptj_train.training.engine import Engine
from gptj_train.training.model_files import ModelFiles
from gptj_train.weights.hf_writer import DTYPES, replace_folder, write_weights
from gptj_train.weights.stored import is_adapter

REPORT = "export_report.json"
_PROMPT_TOKENS = 32


def export(
    engine: Engine,
    model_files: ModelFiles,
    folder: str | Path,
    dtype: str,
    facts: Mapping[str, str],
    lora: LoraConfig,
    base: str | None,
) -> Path:
    """Write weights, config, tokenizer and model card that Transformers loads unchanged. Collective.

    Rank 0 holds one tensor besides its own part. The folder gets its name once it has been read again and
    agrees with the live model; what was found goes to export_report.json beside it. With LoRA the weights are
    merged, and ``adapter`` beside the folder has the adapters alone.

    Args:
        dtype: bf16, fp16 or fp32.
        facts: of the run, for model card and report.
        base: the folder that a run with LoRA began from.

    Raises:
        ExportError: on all ranks, when a check fails; no folder is left.
    """
    target = Path(folder)
    expected = _live_logits(engine, model_files.config)
    trained = _trained_with_lora(engine, lora)
    weights = _merged_weights(engine, lora, trained)
    shapes = {name: shape for name, shape in engine.shapes.items() if not is_adapter(name)}
    failures = [""]
    if engine.rank == 0:
        try:
            facts = dict(facts) | progress(target.parent, base)
            card = model_card(model_files.architecture, facts)
            report = write_verified(target, weights, shapes, DTYPES[dtype], model_files, card, expected)
            if trained:
                _write_adapter_folder(target.with_name("adapter"), trained, lora, base, model_files.architecture)
            write_export_report(target, report | {"architecture": model_files.architecture, "run": facts})
        except (ExportError, OSError) as error:
            failures = [f"the export failed, {target} is not written: {error}"]
    deque(weights, maxlen=0)  # the other ranks take part in the gathering, whatever became of rank 0
    if failure := "".join(engine.gathered(failures)):
        raise ExportError(failure)
    return target


def write_verified(
    target: Path,
    weights: Iterator[tuple[str, Tensor]],
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    model_files: ModelFiles,
    card: str,
    expected: Tensor,
) -> dict[str, Any]:
    """A folder of these weights, which takes the place of ``target`` if every check finds what it should.

    Args:
        expected: what the head of the model says to ``prompt_ids``.

    Returns:
        What the checks found.

    Raises:
        ExportError: a check failed.
    """
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        written = write_weights(scratch, weights, shapes, dtype)
        model_files.save(scratch, dtype)
        (scratch / "README.md").write_text(card)
        report = verify_folder(scratch, shapes, dtype, written)
        report["logits"] = check_logits(scratch, prompt_ids(model_files.config), expected)
        replace_folder(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return report


def prompt_ids(config: GPTJConfig) -> Tensor:
    """(1, T) ids from all over the vocabulary, always the same."""
    return (1 + 7919 * torch.arange(min(_PROMPT_TOKENS, config.n_positions)))[None] % config.vocab_size


def progress(run: Path, base: str | None, until: int | None = None) -> dict[str, str]:
    """What a run did up to a step, or so far, and what came of it, from its metrics."""
    lines = [line for line in read_metrics(run) if until is None or line["step"] <= until]
    step = next((line for line in reversed(lines) if line.get("loss") is not None), None)
    evaluation: dict[str, Any] = next((line for line in reversed(lines) if "eval_loss" in line), {})
    facts = {"start": "random weights" if base is None else Path(base).name}
    if step is not None:
        facts["training"] = f"{step['step']:,} steps, {step['tokens']:,} target tokens, loss {step['loss']:.4f}"
    return facts | {name.replace("_", " "): f"{value:.4f}" for name, value in results_of(evaluation).items()}


def _trained_with_lora(engine: Engine, lora: LoraConfig) -> dict[str, Tensor]:
    """Gather adapters and new heads, fp32 on the host; empty without LoRA. Collective."""
    if not lora.rank:
        return {}
    return {name: tensor.cpu().clone() for name, tensor in engine.full_parameters(set(engine.trained))}


def _merged_weights(engine: Engine, lora: LoraConfig, trained: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of the model in fp32, LoRA merged. Collective."""
    adapters = {name: tensor.to(engine.device) for name, tensor in trained.items() if is_adapter(name)}
    return merged(engine.full_parameters(), adapters, lora.alpha / max(lora.rank, 1))


def _live_logits(engine: Engine, config: GPTJConfig) -> Tensor:
    """(T or 1, rows of the head) of the model as it computes now."""
    ids = prompt_ids(config)
    with engine.evaluating():
        output = engine.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 1.0)
        if hasattr(output, "start_logits"):
            return torch.stack((output.start_logits[0], output.end_logits[0]), dim=-1).cpu()
        return output.logits.flatten(0, -2).cpu()


def _write_adapter_folder(
    target: Path, trained: Mapping[str, Tensor], lora: LoraConfig, base: str | None, architecture: str
) -> None:
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    heads = {name.partition(".")[0] for name in trained if not is_adapter(name)}
    save_adapter(
        scratch,
        trained.items(),
        {name: tensor.shape for name, tensor in trained.items()},
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        heads=sorted(heads),
        base=base,
        architecture=architecture,
    )
    replace_folder(scratch, target)


def write_export_report(target: Path, report: dict[str, Any]) -> None:
    """export_report.json beside an export."""
    scratch = target.with_name(f".{REPORT}.tmp")
    scratch.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(scratch, target.with_name(REPORT))
