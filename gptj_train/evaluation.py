"""Metrics and predictions of a checkpoint of any task, by one process or shared by several ranks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from gptj_train.config import EvaluateConfig
from gptj_train.data.corpus import prepare
from gptj_train.data.files import find_files
from gptj_train.data.labelled import labelled_rows
from gptj_train.data.squad import SUFFIXES, Features, read_files
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.model.config import GPTJConfig
from gptj_train.model.heads import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification
from gptj_train.tasks.classification import Classification, ClassificationTaskConfig, names_of
from gptj_train.tasks.clm import CausalLM
from gptj_train.tasks.question_answering import QuestionAnswering
from gptj_train.training.task import Task
from gptj_train.weights.hf_writer import DTYPES
from gptj_train.weights.placement import place
from gptj_train.weights.pretrained import class_of

_TIMEOUT = timedelta(hours=6)  # for the ranks that are done first


def build_task(cfg: EvaluateConfig) -> Task:
    """The held-out data, batched for the model that the checkpoint's config.json names.

    Raises:
        ValueError: a folder without a task of ours or without tokenizer, or data that does not suit it.
    """
    model = GPTJConfig.from_pretrained(cfg.checkpoint)
    tokenizer = Tokenizer.load(cfg.checkpoint)
    tokenizer.check_fits(model.vocab_size)
    length = model.n_positions if cfg.sequence_length is None else cfg.sequence_length
    if length > model.n_positions:
        raise ValueError(f"sequence_length {length} exceeds the model's n_positions ({model.n_positions})")
    cls = class_of(cfg.checkpoint)
    for head, build in _TASKS.items():
        if issubclass(cls, head):
            return build(cfg, model, tokenizer, length)
    raise ValueError(f"{cfg.checkpoint}: {cls.__name__} has no head to evaluate")


def _language_modelling(cfg: EvaluateConfig, model: GPTJConfig, tokenizer: Tokenizer, length: int) -> Task:
    held_out = prepare(cfg.data, tokenizer, length).held_out
    return CausalLM(None, None, held_out, tokenizer, cfg.data.isolate, 0, cfg.batch_size, cfg.batch_size)


def _classification(cfg: EvaluateConfig, model: GPTJConfig, tokenizer: Tokenizer, length: int) -> Task:
    problem = model.problem_type or ("regression" if model.num_labels == 1 else "single_label_classification")
    names = names_of(model)
    rows = labelled_rows(cfg.data.validation, cfg.data.labelled, problem, names, tokenizer, length)
    config = ClassificationTaskConfig(problem_type=problem, labels=None, class_weights=None)  # type: ignore[arg-type]
    return Classification(None, rows, names, config, tokenizer.end_id, 0, cfg.batch_size, cfg.batch_size)


def _question_answering(cfg: EvaluateConfig, model: GPTJConfig, tokenizer: Tokenizer, length: int) -> Task:
    task = cfg.task
    questions = read_files(find_files(cfg.data.validation, "data.validation", SUFFIXES))
    features = Features(questions, tokenizer, length, task.doc_stride, task.max_question_tokens, task.repeat_context)
    return QuestionAnswering(None, features, task, 0, cfg.batch_size, cfg.batch_size)


_TASKS: dict[type, Callable[[EvaluateConfig, GPTJConfig, Tokenizer, int], Task]] = {
    GPTJForCausalLM: _language_modelling,
    GPTJForSequenceClassification: _classification,
    GPTJForQuestionAnswering: _question_answering,
}


@torch.no_grad()
def evaluate(checkpoint: str, dtype: str | None, task: Task, rank: int, world_size: int) -> dict[str, Any]:
    """Run a checkpoint's model over all held-out data; the metrics, on every rank.

    Each rank holds the whole model and takes its share of the data.

    Args:
        dtype: of the weights, a key of ``DTYPES``; None keeps what is stored.
    """
    model = class_of(checkpoint).from_pretrained(checkpoint, DTYPES[dtype] if dtype else None)
    device = place(model)
    records: list[Any] = []
    batches = task.evaluation_batches(rank, world_size)
    for batch in tqdm(batches, desc="evaluating", unit="batch", disable=rank > 0 or not sys.stderr.isatty()):
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        records += task.records(model(**moved, use_cache=False, num_items_in_batch=1.0), batch)
    return task.metrics(_gathered(records, world_size))


def _gathered(rows: list[Any], world_size: int) -> list[Any]:
    if world_size == 1:
        return rows
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    of_rank: list[list[Any]] = [[] for _ in range(world_size)]
    dist.all_gather_object(of_rank, rows)
    return [row for rows in of_rank for row in rows]


def write_results(folder: str | Path, metrics: dict[str, Any], task: Task) -> None:
    """metrics.json and what the task predicted."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    task.write_predictions(folder)
