"""Questions from SQuAD files, v1 or v2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_train.data.files import find_files
from gptj_train.errors import UserError
from gptj_train.schema import schema

SUFFIXES = (".json", ".jsonl")


@schema
class QADataConfig:
    """Questions to train on and to hold out: SQuAD's .json or flat .jsonl. Files, folders or globs, one or a list."""

    train: str | list[str]
    validation: str | list[str] | None


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        answers: all that count as correct; empty if the context does not contain an answer (SQuAD v2).
        answer_start: character of the context at which the first answer begins.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    answer_start: int | None


def read_questions(data: QADataConfig) -> tuple[list[Question], list[Question]]:
    """Read the training and held-out questions. All files are found before any is read.

    Raises:
        UserError: a path that matches nothing, or a bad record, named by file and place.
    """
    train = find_files(data.train, "data.train", SUFFIXES)
    validation = find_files(data.validation, "data.validation", SUFFIXES) if data.validation else []
    return read_files(train), read_files(validation) if validation else []


def read_files(files: list[Path]) -> list[Question]:
    """Read the questions of SQuAD files: nested .json, flat .json, or .jsonl with a flat record a line.

    Raises:
        UserError: a bad record, named by file and place, or no question at all.
    """
    questions: dict[str, Question] = {}
    for file in files:
        for record, where in _records(file):
            question = _question(record, where)
            if question.id in questions:
                raise UserError(
                    f"{where}: duplicate id {question.id!r}; predictions are stored by id, so make it unique"
                )
            questions[question.id] = question
    if not questions:
        names = ", ".join(str(file) for file in files[:3])
        raise UserError(f"{names}: the data contain no question")
    return list(questions.values())


# --- records of a file ---


def _records(file: Path) -> Iterator[tuple[Any, str]]:
    """Yield flat records, and the place of each for messages."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if file.suffix == ".jsonl":
        # Not splitlines, which would also split at Unicode's other line separators.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                where = f"{file}:{number}"
                yield _parse(line, where), where
        return
    entries = _field(_parse(text, str(file)), "data", list, str(file))
    for number, entry in enumerate(entries):
        where = f"{file}: data[{number}]"
        if isinstance(entry, dict) and "paragraphs" in entry:
            yield from _records_of_article(entry, where)
        else:
            yield entry, where


def _records_of_article(article: dict[str, Any], where: str) -> Iterator[tuple[Any, str]]:
    """Flatten SQuAD's nested form: each question gets a copy of its paragraph's context."""
    for i, paragraph in enumerate(_field(article, "paragraphs", list, where)):
        inside = f"{where}.paragraphs[{i}]"
        context = _field(paragraph, "context", str, inside)
        for j, question in enumerate(_field(paragraph, "qas", list, inside)):
            place = f"{inside}.qas[{j}]"
            yield {**_checked(question, dict, place), "context": context}, place


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); a file with one record a line must be named .jsonl") from None


# --- fields of a record ---


def _question(record: Any, where: str) -> Question:
    name = _field(record, "id", str, where)
    question = _field(record, "question", str, where)
    context = _field(record, "context", str, where)
    answers = _answers(record, where)
    for text, start in answers:
        if not text.strip():
            raise UserError(f"{where}: an answer is empty; for a question without an answer, leave the list empty")
        # A negative start would count from the end.
        if start < 0 or context[start : start + len(text)] != text:
            raise UserError(
                f"{where}: the answer {text!r} is not at character {start} of its context; "
                "answer_start counts Unicode characters from 0"
            )
    texts = tuple(text for text, _ in answers)
    return Question(name, question, context, texts, answers[0][1] if answers else None)


def _answers(record: Any, where: str) -> list[tuple[str, int]]:
    """Return (text, start) of each answer.

    SQuAD has a list of answers, each with both fields; flat files have one dictionary of two lists.
    """
    answers = _field(record, "answers", (list, dict), where)
    if isinstance(answers, dict):
        texts = _field(answers, "text", list, where)
        starts = _field(answers, "answer_start", list, where)
        if len(texts) != len(starts):
            raise UserError(f"{where}: {len(texts)} answer texts, but {len(starts)} starts; give one for each")
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    pairs = []
    for answer in answers:
        text = _field(answer, "text", str, where)
        start = _field(answer, "answer_start", int, where)
        pairs.append((text, start))
    return pairs


def _field(record: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return a field of a record, of one of these types."""
    fields = _checked(record, dict, where)
    if name not in fields:
        raise UserError(f"{where}: the field {name!r} is missing")
    return _checked(fields[name], kind, f"{where}: {name!r}")


def _checked(value: Any, kind: type | tuple[type, ...], where: str) -> Any:
    """Return the value itself, if it has one of these types and, as a text, is valid Unicode."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(one.__name__ for one in kinds)
        raise UserError(f"{where} is not a {names}, but {str(value)[:40]!r}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: the text contains a lone surrogate, which is not valid Unicode") from None
    return value
