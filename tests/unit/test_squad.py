"""SQuAD files are read exactly, and the tokens of every answer decode to it."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptj_train.data.squad import Question, read_files
from gptj_train.data.squad_features import Features, windows
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError

CORPUS = (
    "What does Größe measure? The café in Zürich — naïve 東京 answers: 12,5 km² of 'straße' 🙂🙂 and the rest.\n" * 3
)
TOKENIZER = Tokenizer.train([CORPUS], 400)
OPTIONS: dict[str, Any] = {"length": 64, "doc_stride": 8, "max_question_tokens": 16, "repeat_context": False}

texts = st.text(st.characters(codec="utf-8"))
some_words = st.lists(
    st.one_of(
        st.sampled_from(["Größe", "naïve", "東京", "the", "12,5", "🙂", "e\u0301", "👩‍👩‍👧"]),
        st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "M"]), min_size=1),
    ),
    min_size=1,
)


def question(context: str, answer: str | None, start: int | None = None) -> Question:
    answers = () if answer is None else (answer,)
    return Question("q", "What is it?", context, answers, start if answer is not None else None)


def features_of(asked: Question, **changes: Any) -> Features:
    return Features([asked], TOKENIZER, **(OPTIONS | changes))


@given(texts)
def test_offsets_are_the_characters_of_every_token(text: str) -> None:
    ids, offsets = TOKENIZER.encode_with_offsets(text)
    sizes = TOKENIZER.bytes_per_token[ids]
    done = 0
    for size, (first, end) in zip(sizes, offsets, strict=True):
        before, covered = len(text[:first].encode()), text[:end].encode()
        assert before <= done < before + len(text[first].encode())
        assert len(covered) - len(text[end - 1].encode()) < done + size <= len(covered)
        done += size
    assert done == len(text.encode())
    assert TOKENIZER.decode(ids.tolist()) == text


def test_special_tokens_in_a_text_are_plain_text() -> None:
    ids, offsets = TOKENIZER.encode_with_offsets("a<|endoftext|>b")
    assert TOKENIZER.eos_id not in ids
    assert offsets[-1].tolist() == [14, 15]


@given(some_words, st.data(), st.sampled_from([" ", "  ", "\n", " \t"]), st.booleans())
def test_the_span_of_whole_words_decodes_to_the_answer(
    words: list[str], data: st.DataObject, space: str, repeat: bool
) -> None:
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, len(words) - 1))
    context, answer = space.join(words), space.join(words[first : last + 1])
    start = len(space.join([*words[:first], ""]))
    (feature,) = features_of(question(context, answer, start), length=10_000, repeat_context=repeat)
    assert TOKENIZER.decode(feature.input_ids[feature.start : feature.end + 1].tolist()).strip() == answer.strip()
    begin, end = (position - feature.context_start for position in (feature.start, feature.end))
    assert context[feature.offsets[begin, 0] : feature.offsets[end, 1]].strip() == answer.strip()


@given(texts.filter(str.strip), st.data())
def test_any_span_is_covered_by_as_few_tokens_as_can(context: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(context) - 1).filter(lambda i: not context[i].isspace()))
    end = data.draw(st.integers(start + 1, len(context)))
    answer = context[start:end].rstrip()
    (feature,) = features_of(question(context, answer, start), length=10_000)
    first, last = feature.offsets[[feature.start - feature.context_start, feature.end - feature.context_start]]
    assert first[0] <= start < first[1]
    assert last[0] < start + len(answer) <= last[1]


@given(st.integers(0, 200), st.integers(1, 60), st.data())
def test_windows_skip_nothing_and_contain_every_short_run(tokens: int, room: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, room))
    cut = windows(tokens, room, stride)
    assert [first for first, _ in cut] == [stride * i for i in range(len(cut))]
    assert all(0 <= end - first <= room for first, end in cut)
    longest = min(room - stride + 1, tokens)
    for start in range(tokens - longest + 1):
        assert any(first <= start and start + longest <= end for first, end in cut)


@pytest.mark.parametrize("repeat", [False, True])
def test_a_long_context_has_its_answer_in_some_windows_and_no_answer_in_the_others(repeat: bool) -> None:
    context = " ".join(f"item{i} is {i * i}" for i in range(100))
    answer = "3025"
    features = list(features_of(question(context, answer, context.index(answer)), repeat_context=repeat))
    held = [feature for feature in features if feature.end < len(feature.input_ids) - 1]
    assert 0 < len(held) < len(features)
    for feature in features:
        ids = feature.input_ids
        assert len(ids) <= 64
        assert ids[-1] == TOKENIZER.eos_id
        assert TOKENIZER.decode(ids.tolist()).startswith("What is it?\n")
        window = TOKENIZER.decode(ids[feature.context_start : -1].tolist())
        assert window == context[feature.offsets[0, 0] : feature.offsets[-1, 1]]
        assert TOKENIZER.decode(ids.tolist()).count(f"\n{window}") == 1 + repeat
        span = TOKENIZER.decode(ids[feature.start : feature.end + 1].tolist())
        assert span.strip() == answer if feature in held else feature.start == feature.end == len(ids) - 1


def test_no_answer_is_the_last_token() -> None:
    (feature,) = features_of(question("Nothing of the kind.", None))
    assert feature.start == feature.end == len(feature.input_ids) - 1
    assert feature.input_ids[feature.end] == TOKENIZER.eos_id


def test_a_long_question_is_truncated() -> None:
    asked = Question("q", " ".join(["why"] * 50), "because", (), None)
    (feature,) = features_of(asked)
    assert len(feature.input_ids) <= 64
    assert TOKENIZER.decode(feature.input_ids[:-1].tolist()).endswith("\nbecause")


def test_an_answer_longer_than_any_window_is_counted() -> None:
    context = "word " * 100
    assert "answers that fit in no window: 1" in str(features_of(question(context, context.strip(), 0)))


def test_windows_that_would_skip_tokens_are_refused() -> None:
    with pytest.raises(UserError, match=r"leaves 46 tokens .* fewer than task.doc_stride \(47\)"):
        features_of(question("a", None), doc_stride=47)


NESTED = {
    "version": "v2.0",
    "data": [
        {
            "title": "Normans",
            "paragraphs": [
                {
                    "context": "In Zürich 🙂 the café opened in 1999.",
                    "qas": [
                        {"id": "a", "question": "When?", "answers": [{"text": "1999", "answer_start": 31}] * 2},
                        {"id": "b", "question": "Why?", "is_impossible": True, "answers": [], "plausible_answers": []},
                    ],
                }
            ],
        }
    ],
}
FLAT = [
    {
        "id": "a",
        "question": "When?",
        "context": "In Zürich 🙂 the café opened in 1999.",
        "answers": {"text": ["1999", "1999"], "answer_start": [31, 31]},
    },
    {
        "id": "b",
        "question": "Why?",
        "context": "In Zürich 🙂 the café opened in 1999.",
        "answers": {"text": [], "answer_start": []},
    },
]


def test_all_forms_of_a_file_read_alike(tmp_path: Path) -> None:
    (tmp_path / "nested.json").write_text(json.dumps(NESTED))
    (tmp_path / "flat.json").write_text(json.dumps({"data": FLAT}, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "flat.jsonl").write_text("\n".join(map(json.dumps, FLAT)) + "\n")
    nested, flat, lines = (read(tmp_path / name) for name in ("nested.json", "flat.json", "flat.jsonl"))
    assert nested == flat == lines
    assert [question.answers for question in nested] == [("1999", "1999"), ()]


def read(*files: Path, bad_records: str = "error", max_bad_share: float = 0.0) -> list[Question]:
    return read_files(list(files), "data.train", bad_records=bad_records, max_bad_share=max_bad_share)


BROKEN: list[tuple[dict[str, Any], str]] = [
    (
        {"answers": {"text": ["1999"], "answer_start": [30]}},
        r"x.jsonl:1: an answer is not at its place; the answer '1999' is not at character 30",
    ),
    ({"answers": {"text": ["In"], "answer_start": [-36]}}, r"x.jsonl:1: .*; the answer 'In' is not at character -36"),
    ({"answers": {"text": [" "], "answer_start": [2]}}, r"x.jsonl:1: an answer is empty"),
    ({"answers": {"text": ["1999"], "answer_start": []}}, r"x.jsonl:1: .*; 1 answer texts, but 0 starts"),
    ({"answers": {"text": ["1999"]}}, r"x.jsonl:1: the field 'answer_start' is missing"),
    ({"answers": 1999}, r"x.jsonl:1: 'answers' is not a list or dict or str; it is '1999'"),
    ({"answers": "e"}, r"x.jsonl:1: an answer without answer_start; the answer 'e' occurs 3 times in its context"),
    ({"id": [7]}, r"x.jsonl:1: an id that is no text or integer"),
    ({"question": "\ud83d"}, r"x.jsonl:1: 'question': the text contains a lone surrogate"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_a_bad_record_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(FLAT[0] | changes))
    with pytest.raises(UserError, match=message):
        read(tmp_path / "x.jsonl")


def test_a_bad_place_in_a_nested_file_is_named(tmp_path: Path) -> None:
    broken = json.loads(json.dumps(NESTED))
    del broken["data"][0]["paragraphs"][0]["qas"][1]["question"]
    (tmp_path / "x.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match=r"data\[0\].paragraphs\[0\].qas\[1\]: .*'question'"):
        read(tmp_path / "x.json")


def test_a_duplicate_id_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join([json.dumps(FLAT[0])] * 2))
    with pytest.raises(UserError, match=r"x.jsonl:2: duplicate id 'a'"):
        read(tmp_path / "x.jsonl")


def test_offsets_are_arrays_of_characters() -> None:
    ids, offsets = TOKENIZER.encode_with_offsets("")
    assert len(ids) == 0
    assert offsets.shape == (0, 2)
    assert offsets.dtype == np.int64


CONTEXT = "Ada wrote it in 1843."


def nested(*questions: dict[str, Any]) -> dict[str, Any]:
    return {"paragraphs": [{"context": CONTEXT, "qas": list(questions)}]}


def flat_question(**changes: Any) -> dict[str, Any]:
    return {
        "question": "Who?",
        "context": CONTEXT,
        "answers": {"text": ["Ada"], "answer_start": [0]},
    } | changes


def test_ids_are_text_and_missing_ones_are_numbered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"answer_id": 1, "text": "Ada", "answer_start": 0, "answer_end": 3, "answer_category": None}
    asked = [{"question": "Who?", "answers": [answer]} | given for given in ({"id": 11899}, {}, {"id": "4"}, {}, {})]
    (tmp_path / "a.json").write_text(json.dumps({"data": [nested(*asked)]}))
    assert [question.id for question in read(tmp_path / "a.json")] == ["11899", "2", "4", "5", "6"]
    assert capsys.readouterr().out == "data.train: questions without an id: 3; their numbers are taken for it\n"


ANSWERS = {
    "two lists": {"text": ["Ada"], "answer_start": [0]},
    "one text": {"text": "Ada", "answer_start": 0},
    "a list of answers": [{"text": "Ada", "answer_start": 0}],
    "just a text": "Ada",
    "a list of texts": ["Ada"],
    "a whole number with a point": {"text": ["Ada"], "answer_start": [0.0]},
}


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_answers_as_people_write_them(tmp_path: Path, answers: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(flat_question(answers=answers)))
    (found,) = read(tmp_path / "a.jsonl")
    assert (found.answers, found.answer_start) == (("Ada",), 0)


FILES = {
    "a list of records": ("a.json", [flat_question()], "indent"),
    "a list of articles": ("a.json", [nested(flat_question())], "indent"),
    "one article": ("a.json", nested(flat_question()), "indent"),
    "articles, a line each": ("a.jsonl", nested(flat_question()), ""),
    "a file of SQuAD named jsonl": ("a.jsonl", {"data": [nested(flat_question())]}, ""),
    "a list in a .jsonl": ("a.jsonl", [flat_question()], "indent"),
    "an article that is a paragraph": ("a.jsonl", {"context": CONTEXT, "qas": [flat_question()]}, ""),
    "another suffix": ("a.JSON.gz", {"data": [flat_question()]}, "gz"),
}


@pytest.mark.parametrize(("name", "content", "form"), FILES.values(), ids=FILES)
def test_files_as_people_have_them(tmp_path: Path, name: str, content: Any, form: str) -> None:
    text = json.dumps(content, indent=1 if form == "indent" else None).encode()
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text if form != "gz" else gzip.compress(text))
    (found,) = read(tmp_path / name)
    assert (found.id, found.question, found.context, found.answers) == ("1", "Who?", CONTEXT, ("Ada",))


def test_a_json_with_a_record_a_line(tmp_path: Path) -> None:
    records = [flat_question(id="a"), flat_question(id="b", question="Who\u2028?")]
    text = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "a.json").write_text(text, encoding="utf-8", newline="")
    assert [question.id for question in read(tmp_path / "a.json")] == ["a", "b"]


def test_tables_of_questions(tmp_path: Path) -> None:
    rows = [flat_question(id="a", answers={"text": ["Ada"], "answer_start": [0]}), flat_question(id="b")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "question", "context", "answers"])
        writer.writeheader()
        writer.writerows([row | {"answers": "Ada"} for row in rows])
    of_parquet, of_csv = read(tmp_path / "a.parquet"), read(tmp_path / "a.csv")
    assert of_parquet == of_csv
    assert [(question.id, question.answers, question.answer_start) for question in of_csv] == [
        ("a", ("Ada",), 0),
        ("b", ("Ada",), 0),
    ]


def test_bad_questions_are_left_out_up_to_a_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [json.dumps(flat_question(id=str(number))) for number in range(3)]
    wrong_place = flat_question(answers={"text": ["Ada"], "answer_start": [1]})
    (tmp_path / "a.jsonl").write_text("\n".join([*good, json.dumps(wrong_place), "broken"]))
    assert len(read(tmp_path / "a.jsonl", bad_records="skip", max_bad_share=0.5)) == 3
    reasons = "1 x an answer is not at its place, 1 x not a line of JSON"
    assert capsys.readouterr().out == f"data.train: 2 of 5 records left out ({reasons})\n"
    with pytest.raises(UserError, match=r"data.train: 40.00% of the records are bad"):
        read(tmp_path / "a.jsonl", bad_records="skip", max_bad_share=0.3)
