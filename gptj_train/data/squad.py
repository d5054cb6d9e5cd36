"""Questions from SQuAD files, v1 or v2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gptj_train.data.bad_records import check_share
from gptj_train.data.files import RECORD_SUFFIXES, find_files
from gptj_train.data.formats import say
from gptj_train.data.held_out_share import HeldOutShare
from gptj_train.data.parsing import BadRecordError, parse_record
from gptj_train.data.record_files import read_records
from gptj_train.errors import UserError
from gptj_train.launch.datasets_by_name import DatasetKeys
from gptj_train.schema import schema

_FIELDS = {"id", "question", "context", "answers", "is_impossible"}


@schema
class QADataConfig(DatasetKeys):
    """Questions to train on and to hold out: SQuAD's .json or flat .jsonl. Files, folders or globs, one or a list."""

    train: str | list[str]
    validation: str | list[str] | None
    bad_records: Literal["error", "skip"]
    max_bad_share: float


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


def read_questions(data: QADataConfig, held_out: HeldOutShare) -> tuple[list[Question], list[Question]]:
    """Read the training and held-out questions. All files are found before any is read.

    Args:
        held_out: the part of the training data that is held out, where there are no validation files.

    Raises:
        UserError: a path that matches nothing, or a bad record, named by file and place.
    """
    held_out.check(data.validation)
    train = find_files(data.train, "data.train", RECORD_SUFFIXES)
    validation = find_files(data.validation, "data.validation", RECORD_SUFFIXES) if data.validation else []
    policy, share = data.bad_records, data.max_bad_share
    questions = read_files(train, "data.train", bad_records=policy, max_bad_share=share)
    if not validation:
        return held_out.divide(questions, lambda question: question.context, "question")
    return questions, read_files(validation, "data.validation", bad_records=policy, max_bad_share=share)


def read_files(files: list[Path], key: str, *, bad_records: str, max_bad_share: float) -> list[Question]:
    """Read the questions of SQuAD files: nested or flat .json, a list of either, or a record a line.

    Args:
        key: the config key that holds the files, for messages.

    Raises:
        UserError: a bad record, named by file and place, too many of them, or no question at all.
    """
    questions: dict[str, Question] = {}
    skipped = Counter[str]()
    numbered = 0
    for file in files:
        for record, where in _records(file):
            try:
                if isinstance(record, BadRecordError):
                    raise record
                question = _question(record)
            except BadRecordError as error:
                if bad_records == "error":
                    raise UserError(f"{where}: {error}") from None
                skipped[error.reason] += 1
                continue
            if not question.id:
                question = replace(question, id=_free_id(questions))
                numbered += 1
            if question.id in questions:
                raise UserError(
                    f"{where}: duplicate id {question.id!r}; predictions are stored by id, so make it unique"
                )
            questions[question.id] = question
    check_share(key, skipped, len(questions), max_bad_share)
    if not questions:
        names = ", ".join(str(file) for file in files[:3])
        raise UserError(f"{names}: the data contain no question")
    if numbered:
        say(f"{key}: questions without an id: {numbered:,}; their numbers are taken for it")
    return list(questions.values())


def _free_id(taken: dict[str, Question]) -> str:
    number = len(taken) + 1
    while str(number) in taken:
        number += 1
    return str(number)


# --- records of a file ---


def _records(file: Path) -> Iterator[tuple[Any, str]]:
    """Yield flat records, or an error in place of one, and the place of each for messages."""
    for row in read_records(file, _FIELDS, lambda read: None):
        try:
            record = parse_record(row["record"])
        except BadRecordError as error:
            yield error, row["where"]
            continue
        yield from _flat(record, row["where"])


def _flat(entry: dict[str, Any], where: str) -> Iterator[tuple[Any, str]]:
    """Yield the questions of an article, or of a paragraph, or the entry itself, which is a flat record."""
    if "qas" in entry:
        yield from _records_of_paragraph(entry, where)
    elif "paragraphs" in entry:
        try:
            paragraphs = _field(entry, "paragraphs", list)
        except BadRecordError as error:
            yield error, where
            return
        for number, paragraph in enumerate(paragraphs):
            yield from _records_of_paragraph(paragraph, f"{where}.paragraphs[{number}]")
    else:
        yield entry, where


def _records_of_paragraph(paragraph: Any, where: str) -> Iterator[tuple[Any, str]]:
    """Flatten SQuAD's nested form: each question gets a copy of its paragraph's context."""
    try:
        context = _field(paragraph, "context", str)
        entries = _field(paragraph, "qas", list)
    except BadRecordError as error:
        yield error, where
        return
    for number, question in enumerate(entries):
        record = {**question, "context": context} if isinstance(question, dict) else question
        yield record, f"{where}.qas[{number}]"


# --- fields of a record ---


def _question(record: Any) -> Question:
    """Return the question of a flat record; one without an id has an empty one.

    Raises:
        BadRecordError: it cannot be used.
    """
    question = _field(record, "question", str)
    context = _field(record, "context", str)
    name = record.get("id")
    if name is not None and (not isinstance(name, (str, int)) or isinstance(name, bool)):
        raise BadRecordError(
            "an id that is no text or integer", f"correct it, or leave it out (it is {str(name)[:40]})"
        )
    answers = _answers(record, context)
    for text, start in answers:
        if not text.strip():
            raise BadRecordError("an answer is empty", "for a question without an answer, leave the list empty")
        # A negative start would count from the end.
        if start < 0 or context[start : start + len(text)] != text:
            raise BadRecordError(
                "an answer is not at its place",
                f"the answer {text!r} is not at character {start} of its context; "
                "answer_start counts Unicode characters from 0",
            )
    texts = tuple(text for text, _ in answers)
    return Question(
        id="" if name is None else _valid(str(name), "id"),
        question=question,
        context=context,
        answers=texts,
        answer_start=answers[0][1] if answers else None,
    )


def _answers(record: dict[str, Any], context: str) -> list[tuple[str, int]]:
    """Return (text, start) of each answer.

    SQuAD has a list of answers, each with both fields; flat files have one dictionary of two lists, or of one text and
    its start. An answer may also be just a text, if it occurs only once.
    """
    if "answers" not in record and record.get("is_impossible") is True:
        return []
    answers = _field(record, "answers", (list, dict, str))
    if isinstance(answers, dict):
        texts, starts = _listed(answers, "text"), _listed(answers, "answer_start")
        if len(texts) != len(starts):
            raise BadRecordError(
                "not as many answer texts as starts", f"{len(texts)} answer texts, but {len(starts)} starts"
            )
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    pairs = []
    for answer in [answers] if isinstance(answers, str) else answers:
        if isinstance(answer, str):
            pairs.append((_valid(answer, "answers"), _only_place(answer, context)))
            continue
        start = _field(answer, "answer_start", (int, float))
        pairs.append((_field(answer, "text", str), int(start)))
    return pairs


def _listed(answers: dict[str, Any], name: str) -> list[Any]:
    value = _field(answers, name, (list, str, int, float))
    return value if isinstance(value, list) else [value]


def _only_place(answer: str, context: str) -> int:
    """Return where an answer without a start begins."""
    count = context.count(answer) if answer else 0
    if count != 1:
        raise BadRecordError(
            "an answer without answer_start", f"the answer {answer!r} occurs {count} times in its context; say where"
        )
    return context.index(answer)


def _field(record: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    """Return a field of a record, of one of these types and, as a text, valid Unicode.

    Raises:
        BadRecordError: otherwise.
    """
    if not isinstance(record, dict):
        raise BadRecordError("not a record", f"a JSON object is wanted, not {str(record)[:40]!r}")
    if name not in record:
        raise BadRecordError(f"the field {name!r} is missing", "add it")
    value = record[name]
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(one.__name__ for one in kinds)
        raise BadRecordError(f"{name!r} is not a {names}", f"it is {str(value)[:40]!r}")
    return _valid(value, name) if isinstance(value, str) else value


def _valid(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecordError(
            f"{name!r}: the text contains a lone surrogate", "this is not valid Unicode, correct it"
        ) from None
    return text
