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
from gptj_train.data.squad_features import SEPARATOR, Features
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.schema import schema
from gptj_train.tasks.squad_metrics import squad_scores
from gptj_train.tasks.task import Batch, EvaluationBatch


@schema
class QATaskConfig:
    """How contexts are cut into windows, and how an answer is chosen."""

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


def qa_layout(config: QATaskConfig, length: int) -> dict[str, Any]:
    """Return what a reader of the export needs to lay out its inputs and choose answers, for config.json."""
    return {
        "order": "question separator context eos",
        "no_answer": "last token (eos)",
        "separator": SEPARATOR,
        "context_copies": 2 if config.repeat_context else 1,
        "max_length": length,
        "doc_stride": config.doc_stride,
        "max_question_tokens": config.max_question_tokens,
        "max_answer_tokens": config.max_answer_tokens,
        "null_threshold": config.null_threshold,
    }


class Span(NamedTuple):
    """A candidate answer.

    Attributes:
        score: start logit + end logit.
        first: index of its first character in the context.
        end: index after its last character.
    """

    score: float
    first: int
    end: int


class WindowAnswers(NamedTuple):
    """The candidate answers of a window.

    Attributes:
        question: index of the question.
        null_score: score of "no answer": start logit + end logit of the window's last token.
        spans: the best spans.
    """

    question: int
    null_score: float
    spans: list[Span]


class BatchAnswers(NamedTuple):
    """The summed loss of an evaluation batch, and the candidates of its windows, padding rows left out."""

    loss: float
    windows: list[WindowAnswers]


class QuestionAnswering:
    """Predict start and end of the answer in its context; both are the last token if there is no answer.

    Args:
        train: training windows; None if the task only evaluates.
        sampler: order of the training windows.
        validation: held-out windows.
        batch_size: windows of an evaluation batch.

    Attributes:
        predictions: the answer to each question id, of the last evaluation.
        candidates: the ``n_best`` answers to each question id with their scores, of the last evaluation.
    """

    targets_name = "windows"

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
        batches = []
        for rows in self.training_rows(step, rank, world_size):
            batches.append(_collate(self._train, rows))
        return batches

    def evaluation_batches(self, rank: int, world_size: int) -> Iterator[EvaluationBatch]:
        for rows in evaluation_batches(len(self._validation), self._batch_size, rank, world_size):
            yield EvaluationBatch(_collate(self._validation, rows), source=rows)

    def targets(self, batch: Batch) -> int:
        """Count the windows: the loss of each is the mean of its start loss and its end loss."""
        length = batch["input_ids"].shape[1]
        # Padding rows have their positions past the end.
        return int((batch["start_positions"] < length).sum())

    def records(self, output: Any, batch: EvaluationBatch) -> list[BatchAnswers]:
        """Return the summed loss and the candidate answers of each window."""
        starts = output.start_logits.float().cpu()
        ends = output.end_logits.float().cpu()
        windows = []
        for row, start, end in zip(batch.source, starts, ends, strict=True):
            if row is not None:
                windows.append(self._answers(row, start, end))
        return [BatchAnswers(output.loss.item(), windows)]

    def _answers(self, row: int, start: Tensor, end: Tensor) -> WindowAnswers:
        """Find the best spans of a window from its start and end logits, (T) each."""
        feature = self._validation[row]
        last = len(feature.input_ids) - 1
        # Only context tokens can answer, neither the question before nor the last token, which is "no answer".
        context = slice(feature.context_start, last)
        best = best_spans(start[context], end[context], self._config.n_best, self._config.max_answer_tokens)
        spans = []
        for score, first_token, last_token in best:
            first_character = int(feature.offsets[first_token, 0])
            end_character = int(feature.offsets[last_token, 1])
            spans.append(Span(score, first_character, end_character))
        null_score = float(start[last] + end[last])
        return WindowAnswers(feature.question, null_score, spans)

    def metrics(self, records: list[BatchAnswers]) -> dict[str, float]:
        """Choose an answer to each question; compute loss per window, and exact match and F1 in percent."""
        questions = self._validation.questions
        windows_of: list[list[WindowAnswers]] = [[] for _ in questions]
        count = 0
        for record in records:
            for window in record.windows:
                windows_of[window.question].append(window)
                count += 1
        for question, windows in zip(questions, windows_of, strict=True):
            answers = best_answers(question.context, windows)
            # As BERT's run_squad.py for SQuAD 2.0: the window that argues least for "no answer" decides.
            null_score = min(window.null_score for window in windows)
            self.predictions[question.id] = choose_answer(answers, null_score, self._config.null_threshold)
            ranked = sorted([*answers, ("", null_score)], key=lambda answer: -answer[1])
            best = ranked[: self._config.n_best]
            self.candidates[question.id] = [{"text": text, "score": score} for text, score in best]
        loss_sum = math.fsum(record.loss for record in records)
        scores = squad_scores(self.predictions, {question.id: question.answers for question in questions})
        return {"eval_loss": loss_sum / count, **scores}

    def write_predictions(self, folder: str | Path) -> None:
        """Write predictions.json, in the format of SQuAD's official scripts, and nbest_predictions.json.

        Before the first evaluation no file is written.
        """
        if not self.predictions:
            return
        _write_json(Path(folder) / "predictions.json", self.predictions)
        _write_json(Path(folder) / "nbest_predictions.json", self.candidates)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def best_spans(start: Tensor, end: Tensor, n_best: int, max_tokens: int) -> list[tuple[float, int, int]]:
    """Return the ``n_best`` spans of at most ``max_tokens`` tokens, as (score, first token, last token), best first.

    Args:
        start, end: logits of the context's tokens, (C) each; a span scores start logit + end logit.
    """
    if len(start) == 0:
        return []
    width = min(max_tokens, len(start))
    # Row i, column j of ``scores`` is the span from token i to token i + j. Spans past the end score -inf. C x width
    # scores instead of C x C: a context of thousands of tokens stays cheap.
    padded = F.pad(end, (0, width - 1), value=-math.inf)
    scores = start[:, None] + padded.unfold(0, width, 1)
    top = scores.flatten().topk(min(n_best, scores.numel()))
    spans = []
    for score, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        first, more = divmod(index, width)
        if score > -math.inf:
            spans.append((score, first, first + more))
    return spans


def best_answers(context: str, windows: list[WindowAnswers]) -> list[tuple[str, float]]:
    """Return the different texts among the spans of a context's windows, each with its best score, best first."""
    spans: list[Span] = []
    for window in windows:
        spans += window.spans
    scores: dict[str, float] = {}
    for span in sorted(spans, reverse=True):
        text = context[span.first : span.end].strip()
        # Windows overlap, and a word may occur twice: the first score of a text is its best.
        if text and text not in scores:
            scores[text] = span.score
    return list(scores.items())


def choose_answer(answers: list[tuple[str, float]], null_score: float, threshold: float | None) -> str:
    """Return the best answer, or "" where ``null_score`` exceeds its score by more than the threshold.

    A threshold of None always answers, as SQuAD v1 demands.
    """
    if not answers:
        return ""
    text, score = answers[0]
    if threshold is not None and null_score - score > threshold:
        return ""
    return text


def _collate(features: Features, rows: Sequence[int | None]) -> Batch:
    """Collate windows into a batch whose length T is the longest window's.

    Args:
        rows: window numbers; None stands for a padding row, without a target.

    Returns:
        input_ids and attention_mask (B, T) int64, padded on the right; start_positions and end_positions (B).
    """
    # A padding row repeats window 0: any valid input will do, since its positions are ignored.
    windows = [features[0 if row is None else row] for row in rows]
    length = max(len(window.input_ids) for window in windows)
    input_ids = torch.full((len(rows), length), features.padding_id)
    mask = torch.zeros_like(input_ids)
    for row, window in enumerate(windows):
        input_ids[row, : len(window.input_ids)] = torch.from_numpy(window.input_ids)
        mask[row, : len(window.input_ids)] = 1
    positions = torch.tensor([(window.start, window.end) for window in windows])
    padding = [row is None for row in rows]
    positions[padding] = length  # past the end: ignored by the loss
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "start_positions": positions[:, 0],
        "end_positions": positions[:, 1],
    }
