"""Export the trained model as a Transformers folder: write from the fp32 masters, read again, check, then rename."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptj_train.atomic_write import new_folder, write_text
from gptj_train.errors import UserError
from gptj_train.export.adapters import HeldTensors, MergedWeights, save_adapter
from gptj_train.export.card_facts import base_path, card_facts, progress
from gptj_train.export.model_card import CardFacts, model_card
from gptj_train.export.verify import ExportError, check_logits, relative_difference, streamed_logits, verify_folder
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.lora import LoraConfig, merged
from gptj_train.model.quantized import Quantization
from gptj_train.training.engine import Engine
from gptj_train.training.model_files import ModelFiles
from gptj_train.weights.checkpoint_weights import open_weights
from gptj_train.weights.hf_writer import DTYPES, MAX_SHARD_BYTES, write_weights
from gptj_train.weights.mean_rows import WithMeanRows
from gptj_train.weights.stored import StoredWeights, is_adapter

_PROMPT_TOKENS = 32
_PROMPT_STRIDE = 7919  # a prime: the ids spread over the vocabulary and do not repeat


def export(
    engine: Engine,
    model_files: ModelFiles,
    folder: str | Path,
    *,
    dtype: str,
    facts: Mapping[str, str],
    lora: LoraConfig,
    base: str | None,
    shard_bytes: int = MAX_SHARD_BYTES,
    until: int | None = None,
    quantize: Quantization = "none",
    mean_rows: Mapping[int, Sequence[int]] | None = None,
) -> Path:
    """Write weights, config, tokenizer and model card that Transformers loads unchanged. Collective.

    Rank 0 holds one tensor besides its own part. The folder gets its name after it was read again and agrees with
    the live model; the results go to NAME_report.json beside it. With LoRA the weights are merged, and
    ``adapter`` beside the folder holds the adapters only. Adapters of a quantized base are merged into the weights
    that ``base`` stores, which are read again, and the folder is compared with these.

    Args:
        dtype: bf16, fp16 or fp32.
        facts: about the run, for model card and report.
        base: the folder or hub id that the run started from.
        shard_bytes: largest size of a weight file.
        until: the step that the weights are of; None: the last.
        quantize: how the engine stores the base.
        mean_rows: embedding row -> rows whose mean the run put there.

    Raises:
        ExportError: on all ranks, when a check fails; no new folder is left.
    """
    target = Path(folder)
    # In this order on every rank: each of the three gathers weights from all of them.
    live = expected = _live_logits(engine, model_files.config)
    trained = _trained_with_lora(engine, lora)
    shapes = {name: shape for name, shape in engine.shapes.items() if not is_adapter(name)}
    weights = iter(()) if quantize != "none" else _merged_weights(engine, lora, trained)
    failure = ""
    if engine.rank == 0:
        try:
            if quantize != "none":
                stored = _merged_into_stored(base, mean_rows or {}, trained, lora)
                weights = ((name, stored.tensor(name)) for name in shapes)
                expected = logits_of(stored, model_files.config, rows=len(live))
            facts = dict(facts) | progress(target.parent, base, until)
            chat = model_files.tokenizer.chat_template is not None
            report = write_verified(
                target,
                weights,
                shapes,
                dtype=DTYPES[dtype],
                model_files=model_files,
                facts=card_facts(facts, run=target.parent, base=base, chat=chat, until=until),
                expected=expected,
                shard_bytes=shard_bytes,
            )
            if trained:
                adapter = target.with_name("adapter")
                about = card_facts(facts, run=target.parent, base=base, chat=chat, until=until, adapter=True)
                _write_adapter_folder(adapter, trained, lora, model_files=model_files, base=base, facts=about)
            if quantize != "none":
                report["logits"]["difference_of_quantized_base"] = round(relative_difference(live, expected), 4)
            write_export_report(target, report | {"architecture": model_files.architecture, "run": facts})
        except (UserError, OSError) as error:
            failure = f"the export failed, {target} is not written: {error}"
    # Other ranks only take part in the gathering. Rank 0 finishes it too if it failed: else they would wait for it.
    deque(weights, maxlen=0)
    failures = "".join(engine.gathered([failure]))
    if failures:
        raise ExportError(failures)
    return target


def write_verified(
    target: Path,
    weights: Iterator[tuple[str, Tensor]],
    shapes: Mapping[str, torch.Size],
    *,
    dtype: torch.dtype,
    model_files: ModelFiles,
    facts: CardFacts,
    expected: Tensor,
    shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Write a model folder, which replaces ``target`` after every check has passed.

    Args:
        weights: (name, tensor) in the order of ``shapes``.
        facts: about the run, for the model card.
        expected: logits of the model for ``prompt_ids``.
        shard_bytes: largest size of a weight file.

    Returns:
        The results of the checks.

    Raises:
        ExportError: a check failed, or the disk is full or broken.
    """
    try:
        with new_folder(target) as scratch:
            hashes = write_weights(scratch, weights, shapes, dtype=dtype, max_shard_bytes=shard_bytes)
            model_files.save(scratch, dtype)
            (scratch / "README.md").write_text(model_card(model_files.architecture, facts), encoding="utf-8")
            report = verify_folder(scratch, shapes, dtype=dtype, written=hashes)
            report["logits"] = check_logits(scratch, prompt_ids(model_files.config), expected)
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror or error}; free or change the disk") from None
    return report


def prompt_ids(config: GPTJConfig) -> Tensor:
    """Return (1, T) ids from all over the vocabulary, the same for every model of this size."""
    positions = torch.arange(min(_PROMPT_TOKENS, config.n_positions))
    return (1 + _PROMPT_STRIDE * positions)[None] % config.vocab_size


def _trained_with_lora(engine: Engine, lora: LoraConfig) -> dict[str, Tensor]:
    """Gather adapters and new heads, fp32 on the host; empty without LoRA. Collective."""
    if not lora.rank:
        return {}
    # clone: the engine may yield views of buffers that its next tensor overwrites.
    return {name: tensor.cpu().clone() for name, tensor in engine.full_parameters(set(engine.trained))}


def _merged_weights(engine: Engine, lora: LoraConfig, trained: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of the model in fp32, LoRA merged. Collective."""
    adapters = {name: tensor.to(engine.device) for name, tensor in trained.items() if is_adapter(name)}
    return merged(engine.full_parameters(), adapters, lora.scale if lora.rank else 0.0)


def _merged_into_stored(
    base: str | None, mean_rows: Mapping[int, Sequence[int]], trained: Mapping[str, Tensor], lora: LoraConfig
) -> StoredWeights:
    """Return the weights that a run on a quantized base started from, with what it trained."""
    assert base is not None
    return MergedWeights(
        WithMeanRows(open_weights(base), mean_rows),
        HeldTensors(Path(base), trained),
        scale=lora.scale,
        precision=torch.float32,
    )


def logits_of(weights: StoredWeights, config: GPTJConfig, rows: int) -> Tensor:
    """Return the logits of the last tokens of ``prompt_ids`` in fp32, (rows, rows of the head)."""
    logits, _ = streamed_logits(weights, config, prompt_ids(config))
    return logits[-rows:]


def _live_logits(engine: Engine, config: GPTJConfig) -> Tensor:
    """Return (T or 1, rows of the head): the logits of the model in its current precision. Collective."""
    ids = prompt_ids(config)
    with engine.evaluating():
        output = engine.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 1.0)
        if hasattr(output, "start_logits"):
            return torch.stack((output.start_logits[0], output.end_logits[0]), dim=-1).cpu()
        logits: Tensor = output.logits
        return logits.flatten(0, -2).cpu()


def _write_adapter_folder(
    target: Path,
    trained: Mapping[str, Tensor],
    lora: LoraConfig,
    *,
    model_files: ModelFiles,
    base: str | None,
    facts: CardFacts,
) -> None:
    """Write adapters, tokenizer and model card: all that PEFT needs besides the base model."""
    heads = {name.partition(".")[0] for name in trained if not is_adapter(name)}
    with new_folder(target) as scratch:
        save_adapter(
            scratch,
            trained.items(),
            {name: tensor.shape for name, tensor in trained.items()},
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            targets=lora.matrices,
            rslora=lora.rslora,
            heads=sorted(heads),
            base=base_path(base),
            architecture=model_files.architecture,
        )
        model_files.save_tokenizer(scratch)
        (scratch / "README.md").write_text(model_card(model_files.architecture, facts), encoding="utf-8")


def report_path(target: Path) -> Path:
    """Return where an export's report lies: beside it, under its name, so that two exports keep theirs."""
    return target.with_name(f"{target.name}_report.json")


def write_export_report(target: Path, report: dict[str, Any]) -> None:
    """Write the report of an export beside it."""
    write_text(report_path(target), json.dumps(report, indent=2) + "\n")
