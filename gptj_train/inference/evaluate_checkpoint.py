"""Evaluate a checkpoint of any task on held-out data, in one process or on several ranks."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from gptj_train.config import EvaluateConfig
from gptj_train.data.corpus import prepare
from gptj_train.data.files import RECORD_SUFFIXES, find_files
from gptj_train.data.labelled import labelled_rows
from gptj_train.data.squad import read_files
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.inference.placement import place
from gptj_train.model.auto import class_of
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.heads import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification
from gptj_train.model.quantized import Quantization
from gptj_train.tasks.classification import Classification, ClassificationTaskConfig, label_names
from gptj_train.tasks.clm import CausalLM
from gptj_train.tasks.question_answering import QuestionAnswering, build_features
from gptj_train.tasks.task import Task
from gptj_train.weights.hf_writer import DTYPES

_GATHER_TIMEOUT = timedelta(hours=6)  # ranks meet only at the end; the fast ones wait for the slowest


def build_task(cfg: EvaluateConfig) -> Task:
    """Build the task of the checkpoint's architecture, with the held-out data.

    Raises:
        UserError: a checkpoint without a tokenizer or a task head, or data that does not suit the task.
    """
    model_config = GPTJConfig.from_pretrained(cfg.checkpoint)
    tokenizer = Tokenizer.load(cfg.checkpoint)
    tokenizer.check_fits(model_config.vocab_size)
    length = model_config.n_positions if cfg.sequence_length is None else cfg.sequence_length
    if length > model_config.n_positions:
        raise UserError(f"sequence_length {length} exceeds the model's n_positions ({model_config.n_positions})")
    cls = class_of(cfg.checkpoint)
    if cls is GPTJForCausalLM:
        return _causal_lm(cfg, tokenizer, length)
    if cls is GPTJForSequenceClassification:
        return _classification(cfg, model_config, tokenizer, length)
    if cls is GPTJForQuestionAnswering:
        return _question_answering(cfg, tokenizer, length)
    raise UserError(f"{cfg.checkpoint}: {cls.__name__} has no head to evaluate")


def _causal_lm(cfg: EvaluateConfig, tokenizer: Tokenizer, length: int) -> Task:
    data = prepare(cfg.data, tokenizer, length)
    return CausalLM(held_out=data.held_out, tokenizer=tokenizer, isolate=data.isolate, batch_size=cfg.batch_size)


def _classification(cfg: EvaluateConfig, model_config: GPTJConfig, tokenizer: Tokenizer, length: int) -> Task:
    problem = model_config.problem_type
    if problem is None:
        # Folders written by Transformers may leave it out. Its own forward then decides by the number of labels.
        problem = "regression" if model_config.num_labels == 1 else "single_label_classification"
    names = label_names(model_config)
    config = ClassificationTaskConfig(problem_type=problem, labels=None, class_weights=None)  # type: ignore[arg-type]
    validation = labelled_rows(
        cfg.data.validation,
        cfg.data.labelled,
        problem_type=problem,
        names=names,
        tokenizer=tokenizer,
        length=length,
    )
    return Classification(
        validation=validation,
        names=names,
        config=config,
        pad_id=tokenizer.eos_id,
        batch_size=cfg.batch_size,
    )


def _question_answering(cfg: EvaluateConfig, tokenizer: Tokenizer, length: int) -> Task:
    questions = read_files(
        find_files(cfg.data.validation, "data.validation", RECORD_SUFFIXES),
        "data.validation",
        bad_records=cfg.data.bad_records,
        max_bad_share=cfg.data.max_bad_share,
    )
    features = build_features(questions, tokenizer, length, cfg.task)
    return QuestionAnswering(validation=features, config=cfg.task, batch_size=cfg.batch_size)


@torch.no_grad()
def evaluate(
    checkpoint: str,
    dtype: str | None,
    task: Task,
    rank: int,
    world_size: int,
    quantize: Quantization = "none",
) -> dict[str, Any]:
    """Run a checkpoint's model over all held-out data and return the metrics, on every rank. Collective.

    Each rank holds the whole model and takes its share of the data.

    Args:
        dtype: of the weights, a key of ``DTYPES``; None keeps the stored dtype.
        quantize: how the matrices of the blocks are stored.
    """
    model = class_of(checkpoint).from_pretrained(checkpoint, DTYPES[dtype] if dtype else None, quantize=quantize)
    device = place(model)
    records: list[Any] = []
    batches = task.evaluation_batches(rank, world_size)
    show_progress = rank == 0 and sys.stderr.isatty()
    for batch in tqdm(batches, desc="evaluating", unit="batch", disable=not show_progress):
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        # num_items_in_batch=1 makes the loss a sum, as Task.records expects.
        output = model(**inputs, use_cache=False, num_items_in_batch=1.0)
        records += task.records(output, batch)
    if world_size > 1:
        records = _all_gather(records, world_size)
    return task.metrics(records)


def _all_gather(records: list[Any], world_size: int) -> list[Any]:
    """Return the records of all ranks, in the order of the ranks, on every rank."""
    # There is no engine here to set up the ranks: this is their only message. gloo, since records are on the CPU.
    dist.init_process_group("gloo", timeout=_GATHER_TIMEOUT)
    by_rank: list[list[Any]] = [[] for _ in range(world_size)]
    dist.all_gather_object(by_rank, records)
    gathered = []
    for records_of_rank in by_rank:
        gathered += records_of_rank
    return gathered


def write_results(folder: str | Path, metrics: dict[str, Any], task: Task) -> None:
    """Write metrics.json and the task's predictions into a folder, which is created."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps(metrics, indent=2, ensure_ascii=False)
    (Path(folder) / "metrics.json").write_text(text + "\n")
    task.write_predictions(folder)
