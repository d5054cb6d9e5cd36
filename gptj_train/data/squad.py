"""SQuAD files -> questions -> windows of tokens that hold their answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptj_train.data.files import find_files
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.schema import schema

SUFFIXES = (".json", ".jsonl")
SEPARATOR = "\n"


@schema
class QADataConfig:
    """Where the questions are: SQuAD's .json or flat .jsonl. Files, folders or globs, one or a list."""

    train: str | list[str]
    validation: str | list[str] | None


@dataclass(frozen=True)
class Question:
    """A question about a context. No answers: the context does not hold one (SQuAD v2).

    ``answers`` are all that count as right; the first begins at character ``answer_start`` of the context.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    answer_start: int | None


def read_questions(data: QADataConfig) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions; the files are all looked for before any is read.

    Raises:
        UserError: a path that matches nothing, or a bad record, named by file and place.
    """
    train = find_files(data.train, "data.train", SUFFIXES)
    validation = find_files(data.validation, "data.validation", SUFFIXES) if data.validation else []
    return read_files(train), read_files(validation) if validation else []


def read_files(files: list[Path]) -> list[Question]:
    """The questions of SQuAD files, v1 or v2: nested .json, flat .json, or .jsonl with a flat record a line.

    Raises:
        UserError: as ``read_questions``.
    """
    questions: dict[str, Question] = {}
    for file in files:
        for record, where in _records(file):
            question = _question(record, where)
            if question.id in questions:
                raise UserError(f"{where}: the id {question.id!r} has come before; predictions are kept by id")
            questions[question.id] = question
    if not questions:
        raise UserError(f"{', '.join(map(str, files[:3]))}: no question in the data")
    return list(questions.values())


def _records(file: Path) -> Iterator[tuple[Any, str]]:
    """Flat records, each with its place for messages."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _parsed(line, f"{file}:{number}"), f"{file}:{number}"
        return
    for i, entry in enumerate(_field(_parsed(text, str(file)), "data", list, str(file))):
        where = f"{file}: data[{i}]"
        if not isinstance(entry, dict) or "paragraphs" not in entry:
            yield entry, where
            continue
        for j, paragraph in enumerate(_field(entry, "paragraphs", list, where)):
            inside = f"{where}.paragraphs[{j}]"
            context = _field(paragraph, "context", str, inside)
            for k, question in enumerate(_field(paragraph, "qas", list, inside)):
                place = f"{inside}.qas[{k}]"
                yield {**_checked(question, dict, place), "context": context}, place


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); one record a line goes into a .jsonl file") from None


def _question(record: Any, where: str) -> Question:
    name, question, context = (_field(record, field, str, where) for field in ("id", "question", "context"))
    answers = _answers(record, where)
    for text, start in answers:
        if not text.strip():
            raise UserError(f"{where}: an answer is empty; a question without an answer has an empty list of them")
        if start < 0 or context[start : start + len(text)] != text:
            raise UserError(
                f"{where}: the answer {text!r} is not at character {start} of its context; "
                "answer_start counts Unicode characters from 0"
            )
    texts = tuple(text for text, _ in answers)
    return Question(name, question, context, texts, answers[0][1] if answers else None)


def _answers(record: Any, where: str) -> list[tuple[str, int]]:
    """(text, start) of each answer: SQuAD's list of dicts, or the dict of lists of flat files."""
    answers = _field(record, "answers", (list, dict), where)
    if isinstance(answers, dict):
        texts, starts = _field(answers, "text", list, where), _field(answers, "answer_start", list, where)
        if len(texts) != len(starts):
            raise UserError(f"{where}: {len(texts)} answer texts and {len(starts)} starts; give one for each")
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    return [(_field(answer, "text", str, where), _field(answer, "answer_start", int, where)) for answer in answers]


def _field(record: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    fields = _checked(record, dict, where)
    if name not in fields:
        raise UserError(f"{where}: the field {name!r} is missing")
    return _checked(fields[name], kind, f"{where}: {name!r}")


def _checked(value: Any, kind: type | tuple[type, ...], where: str) -> Any:
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise UserError(f"{where} is not a {' or '.join(k.__name__ for k in kinds)}, but {str(value)[:40]!r}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: the text holds a lone surrogate, which is no valid Unicode") from None
    return value


@dataclass(frozen=True, eq=False)
class Feature:
    """A question with one window of its context, as the model reads it.

    The question comes first, so that the context has seen it; the end-of-text token comes last, has seen
    everything, and stands for "no answer".

    Attributes:
        question: number of the question.
        input_ids: (T) int64.
        context_start: position of the first context token that can answer.
        offsets: (C, 2) characters of the window's context tokens.
        start, end: positions of the answer's first and last token; both T - 1 where the window holds no whole answer.
    """

    question: int
    input_ids: np.ndarray
    context_start: int
    offsets: np.ndarray
    start: int
    end: int


class Features(Sequence[Feature]):
    """Every window of every question's context, put together when asked for."""

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
        """Tokenize the questions; a context they share is kept once.

        Args:
            length: T, tokens of a feature at most.
            doc_stride: tokens between the starts of two windows of a context that is too long for one.
            max_question_tokens: longer questions lose their end.
            repeat_context: read the context twice, and answer from the second reading.

        Raises:
            UserError: sizes that would leave context tokens out of all windows.
        """
        self.questions = questions
        self._end_id, self._separator = tokenizer.end_id, tokenizer.encode_with_offsets(SEPARATOR)[0]
        self._readings = 2 if repeat_context else 1
        contexts = {question.context: tokenizer.encode_with_offsets(question.context) for question in questions}
        self._contexts = [contexts[question.context] for question in questions]
        self._questions = [
            tokenizer.encode_with_offsets(question.question.strip())[0][:max_question_tokens] for question in questions
        ]
        smallest = self._room(length, max_question_tokens)
        if smallest < doc_stride:
            raise UserError(
                f"sequence_length {length} leaves {smallest} tokens for the context beside a question of "
                f"{max_question_tokens}, fewer than task.doc_stride ({doc_stride}): tokens would be skipped; "
                "raise sequence_length or lower the others"
            )
        self._windows = [
            (number, *window)
            for number, (asked, (ids, _)) in enumerate(zip(self._questions, self._contexts, strict=True))
            for window in windows(len(ids), self._room(length, len(asked)), doc_stride)
        ]

    @property
    def padding_id(self) -> int:
        """What fills batches up: not the end of text, which would look like a second place for "no answer"."""
        return int(self._separator[0])

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Feature:  # type: ignore[override]
        number, first, last = self._windows[index]
        ids, offsets = self._contexts[number]
        reading = np.concatenate((self._separator, ids[first:last]))
        input_ids = np.concatenate((self._questions[number], *[reading] * self._readings, [self._end_id]))
        context_start = len(input_ids) - 1 - (last - first)
        start = end = len(input_ids) - 1
        if (span := answer_tokens(self.questions[number], offsets)) and first <= span[0] and span[1] < last:
            start, end = (context_start + token - first for token in span)
        return Feature(number, input_ids, context_start, offsets[first:last], start, end)

    def __str__(self) -> str:
        answerable = sum(bool(question.answers) for question in self.questions)
        held = {feature.question for feature in self if feature.end < len(feature.input_ids) - 1}
        text = f"{len(self.questions):,} questions, {answerable:,} with an answer, in {len(self):,} windows"
        return text + (f"; {answerable - len(held):,} answers fit no window" if answerable > len(held) else "")

    def _room(self, length: int, question_tokens: int) -> int:
        """Tokens of a window, beside the question, separators and end of text."""
        return (length - 1 - question_tokens - self._readings * len(self._separator)) // self._readings


def windows(tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """(first, past the last) token of each window, so that every run of ``room - stride + 1`` lies whole in one."""
    starts = range(0, max(tokens - room, 0) + stride, stride)
    return [(start, min(start + room, tokens)) for start in starts]


def answer_tokens(question: Question, offsets: np.ndarray) -> tuple[int, int] | None:
    """First and last context token of the first answer, without the spaces around it; None without an answer."""
    if question.answer_start is None:
        return None
    answer = question.answers[0]
    start = question.answer_start + len(answer) - len(answer.lstrip())
    end = start + len(answer.strip())
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], end, side="left")) - 1
    return first, last
