"""Extractive question answering: SQuAD v1 and v2."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gptj_train.data.sampler import Sampler, evaluation_batches
from gptj_train.data.squad import Question
from gptj_train.data.squad_features import Features
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.schema import schema
from gptj_train.tasks.squad_metrics import squad_scores
from gptj_train.tasks.task import Batch, EvaluationBatch


@schema
class QATaskConfig:
    """How contexts are cut and answers chosen."""

    doc_stride: int
    max_question_tokens: int
    max_answer_tokens: int
    n_best: int
    null_threshold: float | None
    repeat_context: bool

    def __post_init__(self) -> None:
        for name in ("doc_stride", "max_question_tokens", "max_answer_tokens", "n_best"):
            if getattr(self, name) < 1:
                raise UserError(f"task.{name} must be at least 1, got {getattr(self, name)}")


def build_features(questions: list[Question], tokenizer: Tokenizer, length: int, config: QATaskConfig) -> Features:
    """Cut the contexts of questions into windows of at most ``length`` tokens, as the config asks for."""
    return Features(
        questions,
        tokenizer,
        length=length,
        doc_stride=config.doc_stride,
        max_question_tokens=config.max_question_tokens,
        repeat_context=config.repeat_context,
    )


class Span(NamedTuple):
    """Characters of a context, and the sum of its start and end logit."""

    score: float
    first: int
    end: int


class FeatureRecord(NamedTuple):
    """What a window of a context proposes: its best spans, and the score of "no answer"."""

    question: int
    null_score: float
    spans: list[Span]


class QuestionAnswering:
    """Start and end of the answer in the context; both on the last token if the context holds no answer.

    Args:
        train: None: the task only evaluates.
        sampler: order of the training windows.
        batch_size: windows of an evaluation batch.

    Attributes:
        predictions: answer text by question id, of the last evaluation.
        candidates: likewise, the best answers with their scores.
    """

    def __init__(
        self,
        *,
        train: Features | None = None,
        sampler: Sampler | None = None,
        validation: Features,
        config: QATaskConfig,
        batch_size: int,
    ) -> None:
        self._train, self._validation = train, validation
        self._sampler = sampler
        self._config = config
        self._batch_size = batch_size
        self.predictions: dict[str, str] = {}
        self.candidates: dict[str, list[dict[str, Any]]] = {}

    def training_rows(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        assert self._sampler is not None
        return self._sampler.windows(step, rank, world_size)

    def training_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        assert self._train is not None
        return [_collate(self._train, rows) for rows in self.training_rows(step, rank, world_size)]

    def evaluation_batches(self, rank: int, world_size: int) -> Iterator[EvaluationBatch]:
        for rows in evaluation_batches(len(self._validation), self._batch_size, rank, world_size):
            yield EvaluationBatch(_collate(self._validation, rows), source=rows)

    def targets(self, batch: Batch) -> int:
        """Count windows; the loss of each is the mean of its start's and its end's."""
        length = batch["input_ids"].shape[1]
        return int((batch["start_positions"] < length).sum())

    def records(self, output: Any, batch: EvaluationBatch) -> list[tuple[float, list[FeatureRecord]]]:
        """Return the summed loss, and the answers that each window proposes."""
        starts, ends = output.start_logits.float().cpu(), output.end_logits.float().cpu()
        proposals = []
        for row, start, end in zip(batch.source, starts, ends, strict=True):
            if row is not None:
                proposals.append(self._proposals(row, start, end))
        return [(output.loss.item(), proposals)]

    def _proposals(self, row: int, start: Tensor, end: Tensor) -> FeatureRecord:
        """Find the best spans of a window from its start and end logits, (T) each."""
        feature = self._validation[row]
        last = len(feature.input_ids) - 1
        context = slice(feature.context_start, last)
        tokens = best_spans(start[context], end[context], self._config.n_best, self._config.max_answer_tokens)
        spans = []
        for score, first_token, last_token in tokens:
            first, past_end = int(feature.offsets[first_token, 0]), int(feature.offsets[last_token, 1])
            spans.append(Span(score, first, past_end))
        null_score = float(start[last] + end[last])
        return FeatureRecord(feature.question, null_score, spans)

    def metrics(self, records: list[tuple[float, list[FeatureRecord]]]) -> dict[str, float]:
        """Loss of a window, exact match and F1 in percent."""
        losses, found = zip(*records, strict=True)
        features = [feature for batch in found for feature in batch]
        questions = self._validation.questions
        of_question: list[list[FeatureRecord]] = [[] for _ in questions]
        for feature in features:
            of_question[feature.question].append(feature)
        for question, windows in zip(questions, of_question, strict=True):
            spans = best_texts(question.context, windows)
            null_score = min(window.null_score for window in windows)
            self.predictions[question.id] = chosen(spans, null_score, self._config.null_threshold)
            ranked = sorted([*spans, ("", null_score)], key=lambda pair: -pair[1])[: self._config.n_best]
            self.candidates[question.id] = [{"text": text, "score": score} for text, score in ranked]
        scores = squad_scores(self.predictions, {question.id: question.answers for question in questions})
        return {"eval_loss": math.fsum(losses) / len(features), **scores}

    def write_predictions(self, folder: str | Path) -> None:
        """predictions.json as the official scripts read it, and nbest_predictions.json; nothing if none were made."""
        if self.predictions:
            for name, values in (("predictions", self.predictions), ("nbest_predictions", self.candidates)):
                text = json.dumps(values, indent=2, ensure_ascii=False)
                (Path(folder) / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def best_spans(start: Tensor, end: Tensor, n_best: int, longest: int) -> list[tuple[float, int, int]]:
    """The ``n_best`` spans of at most ``longest`` tokens by the sum of their logits: (score, first, last token).

    Args:
        start, end: (C) logits of the context's tokens.
    """
    if not len(start):
        return []
    longest = min(longest, len(start))
    ends = F.pad(end, (0, longest - 1), value=-math.inf).unfold(0, longest, 1)
    scores = (start[:, None] + ends).flatten()  # of the span from token i over j more at i * longest + j
    top = scores.topk(min(n_best, len(scores)))
    places = (divmod(index, longest) for index in top.indices.tolist())
    ranked = zip(top.values.tolist(), places, strict=True)
    return [(score, first, first + more) for score, (first, more) in ranked if score > -math.inf]


def best_texts(context: str, windows: list[FeatureRecord]) -> list[tuple[str, float]]:
    """Texts that the windows of a context propose, each with its best score, best first."""
    scores: dict[str, float] = {}
    for score, first, end in sorted((span for window in windows for span in window.spans), reverse=True):
        if text := context[first:end].strip():
            scores.setdefault(text, score)
    return list(scores.items())


def chosen(spans: list[tuple[str, float]], null_score: float, threshold: float | None) -> str:
    """The best text, or "" where no answer beats it by more than the threshold; None always answers."""
    if not spans or (threshold is not None and null_score - spans[0][1] > threshold):
        return ""
    return spans[0][0]


def _collate(features: Features, rows: Sequence[int | None]) -> Batch:
    """Collate windows into a batch whose length T is the longest window's.

    Args:
        rows: None stands for padding: a row without a target.

    Returns:
        input_ids and attention_mask (B, T) int64, padded on the right; start_positions and end_positions (B).
    """
    windows = [features[0 if row is None else row] for row in rows]
    length = max(len(window.input_ids) for window in windows)
    input_ids = torch.full((len(rows), length), features.padding_id)
    mask = torch.zeros_like(input_ids)
    for row, window in enumerate(windows):
        input_ids[row, : len(window.input_ids)] = torch.from_numpy(window.input_ids)
        mask[row, : len(window.input_ids)] = 1
    positions = torch.tensor([(window.start, window.end) for window in windows])
    positions[[row is None for row in rows]] = length  # past the end: ignored by the loss
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "start_positions": positions[:, 0],
        "end_positions": positions[:, 1],
    }
