"""Extractive question answering: SQuAD v1 and v2."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gptj_train.data.loader import evaluation_batches, micro_batches_at
from gptj_train.data.squad import Features
from gptj_train.schema import schema
from gptj_train.tasks.squad_metrics import squad_scores


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
                raise ValueError(f"task.{name} must be at least 1, got {getattr(self, name)}")


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
    """Start and end of the answer in the context, both on the last token where there is none.

    Without ``train`` it only evaluates. ``predictions`` and ``candidates``, by question id, are those of the last
    evaluation.
    """

    def __init__(
        self,
        train: Features | None,
        validation: Features,
        config: QATaskConfig,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
    ) -> None:
        self._train, self._validation, self._config = train, validation, config
        self._seed = seed
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self.predictions: dict[str, str] = {}
        self.candidates: dict[str, list[dict[str, Any]]] = {}

    def training_rows(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        assert self._train is not None
        return micro_batches_at(
            step, len(self._train), self._seed, self._global_batch_size, self._micro_batch_size, rank, world_size
        )

    def training_batches(self, step: int, rank: int, world_size: int) -> list[dict[str, Tensor]]:
        assert self._train is not None
        return [_Batch(self._train, rows) for rows in self.training_rows(step, rank, world_size)]

    def evaluation_batches(self, rank: int, world_size: int) -> Iterable[dict[str, Tensor]]:
        for rows in evaluation_batches(len(self._validation), self._micro_batch_size, rank, world_size):
            yield _Batch(self._validation, rows)

    def targets(self, batch: dict[str, Tensor]) -> int:
        """Windows; the loss of each is the mean of its start's and its end's."""
        return int((batch["start_positions"] < batch["input_ids"].shape[1]).sum())

    def records(self, output: Any, batch: dict[str, Tensor]) -> list[tuple[float, list[FeatureRecord]]]:
        """Summed loss, and what each window proposes."""
        assert isinstance(batch, _Batch)
        starts, ends = output.start_logits.float().cpu(), output.end_logits.float().cpu()
        found = []
        for row, start, end in zip(batch.rows, starts, ends, strict=True):
            if row is None:
                continue
            feature = self._validation[row]
            last = len(feature.input_ids) - 1
            context = slice(feature.context_start, last)
            spans = best_spans(start[context], end[context], self._config.n_best, self._config.max_answer_tokens)
            null_score = float(start[last] + end[last])
            characters = [Span(s, int(feature.offsets[i, 0]), int(feature.offsets[j, 1])) for s, i, j in spans]
            found.append(FeatureRecord(feature.question, null_score, characters))
        return [(output.loss.item(), found)]

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


class _Batch(dict[str, Tensor]):
    """input_ids and attention_mask, (B, T) int64, padded on the right; start_positions and end_positions (B).

    T is the longest row's length. A row of None stands for no window: it has no target. ``rows`` tells them apart.
    """

    def __init__(self, features: Features, rows: Sequence[int | None]) -> None:
        self.rows = rows
        found = [features[0 if row is None else row] for row in rows]
        length = max(len(feature.input_ids) for feature in found)
        input_ids = torch.full((len(rows), length), features.padding_id)
        mask = torch.zeros_like(input_ids)
        for row, feature in enumerate(found):
            input_ids[row, : len(feature.input_ids)] = torch.from_numpy(feature.input_ids)
            mask[row, : len(feature.input_ids)] = 1
        positions = torch.tensor([(feature.start, feature.end) for feature in found])
        positions[[row is None for row in rows]] = length
        super().__init__(
            input_ids=input_ids,
            attention_mask=mask,
            start_positions=positions[:, 0],
            end_positions=positions[:, 1],
        )
