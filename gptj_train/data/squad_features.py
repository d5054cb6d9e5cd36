"""Questions -> windows of tokens, with the positions of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptj_train.counted import counted
from gptj_train.data.squad import Question
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError

SEPARATOR = "\n"


@dataclass(frozen=True, eq=False)
class Feature:
    """A question with one window of its context: a sample of the model.

    It is "question separator context EOS", or with the context twice. The question comes first, so that the context
    attends to it. The EOS token comes last, attends to everything, and stands for "no answer".

    Attributes:
        question: index of the question.
        input_ids: (T) int64.
        context_start: position of the first context token that can answer.
        offsets: (C, 2) int64, characters of the window's C context tokens: first, and one past the last.
        start, end: positions of the answer's first and last token; both T - 1 if the window lacks the whole answer.
    """

    question: int
    input_ids: np.ndarray
    context_start: int
    offsets: np.ndarray
    start: int
    end: int


class Features(Sequence[Feature]):
    """The windows of the contexts of all questions; ``features[i]`` is put together when it is read."""

    def __init__(
        self,
        questions: list[Question],
        tokenizer: Tokenizer,
        *,
        length: int,
        doc_stride: int,
        max_question_tokens: int,
        repeat_context: bool,
    ) -> None:
        """Tokenize the questions and their contexts.

        Args:
            length: T, tokens of a feature at most.
            doc_stride: tokens between the starts of two windows of a context that is too long for one.
            max_question_tokens: longer questions are truncated.
            repeat_context: write the context twice, and answer from the second copy.

        Raises:
            UserError: sizes that would leave context tokens out of all windows.
        """
        self.questions = questions
        self._eos_id = tokenizer.eos_id
        self._separator, _ = tokenizer.encode_with_offsets(SEPARATOR)
        self._copies = 2 if repeat_context else 1
        room = self._room(length, max_question_tokens)
        if room < doc_stride:
            raise UserError(
                f"sequence_length {length} leaves {max(room, 0)} tokens for the context beside a question of "
                f"{max_question_tokens}, fewer than task.doc_stride ({doc_stride}): tokens would be skipped; "
                "raise sequence_length or lower the others"
            )
        # Many questions share a context: each is tokenized and kept once.
        contexts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._contexts = []
        self._questions = []
        self._windows: list[tuple[int, int, int]] = []  # question, first context token, one past the last
        for number, question in enumerate(questions):
            if question.context not in contexts:
                contexts[question.context] = tokenizer.encode_with_offsets(question.context)
            self._contexts.append(contexts[question.context])
            question_ids, _ = tokenizer.encode_with_offsets(question.question.strip())
            self._questions.append(question_ids[:max_question_tokens])
            context_ids, _ = self._contexts[number]
            for first, end in windows(len(context_ids), self._room(length, len(self._questions[number])), doc_stride):
                self._windows.append((number, first, end))

    @property
    def padding_id(self) -> int:
        """Token that fills batches: not EOS, which would look like another position for "no answer"."""
        return int(self._separator[0])

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Feature:  # type: ignore[override]
        number, first, end = self._windows[index]
        ids, offsets = self._contexts[number]
        copies = [self._separator, ids[first:end]] * self._copies
        input_ids = np.concatenate((self._questions[number], *copies, [self._eos_id]))
        no_answer = len(input_ids) - 1
        # The window that answers is the last one, right before EOS.
        context_start = no_answer - (end - first)
        start = last = no_answer
        answer = answer_tokens(self.questions[number], offsets)
        if answer is not None and first <= answer[0] and answer[1] < end:
            start, last = (context_start + token - first for token in answer)
        return Feature(number, input_ids, context_start, offsets[first:end], start, last)

    def __str__(self) -> str:
        answerable = sum(bool(question.answers) for question in self.questions)
        held = {feature.question for feature in self if feature.end < len(feature.input_ids) - 1}
        questions, windows = counted(len(self.questions), "question"), counted(len(self), "window")
        text = f"{questions}, {answerable:,} with an answer, in {windows}"
        missing = answerable - len(held)
        return f"{text}; answers that fit in no window: {missing:,}" if missing > 0 else text

    def _room(self, length: int, question_tokens: int) -> int:
        """Return how many context tokens fit beside the question, the separators and EOS."""
        separators = self._copies * len(self._separator)
        return (length - 1 - question_tokens - separators) // self._copies


def windows(tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Cut a context into windows: (first token, one past the last) of each.

    Every run of at most ``room - stride + 1`` tokens lies whole in one of them.
    """
    # The last start is the first one from which the rest fits.
    starts = range(0, max(tokens - room, 0) + stride, stride)
    return [(start, min(start + room, tokens)) for start in starts]


def answer_tokens(question: Question, offsets: np.ndarray) -> tuple[int, int] | None:
    """Return the first and last context token of the first answer, without surrounding spaces; None without answer."""
    if question.answer_start is None:
        return None
    answer = question.answers[0]
    leading_spaces = len(answer) - len(answer.lstrip())
    start = question.answer_start + leading_spaces
    end = start + len(answer.strip())
    # The first token that ends after ``start``, and the last one that begins before ``end``.
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], end, side="left")) - 1
    return first, last
