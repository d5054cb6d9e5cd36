"""Labelled rows are read from every kind of file; a mistake is one line that names file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest

from gptj_train.data.labelled import LabelledDataConfig, LabelledRows, join_pair, prepare_labelled
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError

SINGLE, MULTI = "single_label_classification", "multi_label_classification"
ROWS: list[dict[str, Any]] = [
    {"text": "12", "label": "None"},
    {"text": "a cat, a dog\nand more", "label": "animal"},
    {"text": 'a "red" car <|endoftext|>', "label": "car"},
    {"text": "NA", "label": "animal"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a cat and a dog in a red car"] * 3, vocab_size=270)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


def read(
    tokenizer: Tokenizer,
    train: str | list[str],
    problem: str = SINGLE,
    labels: list[str] | None = None,
    length: int = 64,
    **fields: Any,
) -> tuple[LabelledRows, LabelledRows | None, list[str]]:
    given = {"validation": None, "text_field": "text", "second_text_field": None, "label_field": "label"} | fields
    data = LabelledDataConfig(train=train, **given)
    return prepare_labelled(data, problem_type=problem, labels=labels, tokenizer=tokenizer, length=length)


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet", ""])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    source = write(tmp_path / f"rows{kind}", ROWS)
    train, validation, names = read(tokenizer, source, validation=source)
    assert names == ["None", "animal", "car"]
    assert train.labels.tolist() == [0, 1, 2, 1]
    assert [tokenizer.decode(ids.tolist()) for ids in train.token_ids] == [row["text"] for row in ROWS]
    assert validation is not None
    assert validation.labels.tolist() == train.labels.tolist()


def test_folders_and_globs_name_their_files_in_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("b.csv", "a.jsonl", "notes.txt"):
        write(tmp_path / name, ROWS[:2]) if name != "notes.txt" else (tmp_path / name).write_text("no data")
    assert len(read(tokenizer, str(tmp_path))[0]) == 4
    assert len(read(tokenizer, [f"{tmp_path}/*.csv", f"{tmp_path}/a.jsonl"])[0]) == 4


def test_names_and_ids_of_labels(tmp_path: Path, tokenizer: Tokenizer) -> None:
    numbers = write(tmp_path / "n.csv", [{"text": "a", "label": label} for label in (10, 9, 1)])
    rows, _, names = read(tokenizer, numbers)
    assert (names, rows.labels.tolist()) == (["1", "9", "10"], [2, 1, 0])

    ids = write(tmp_path / "ids.jsonl", [{"text": "a", "label": label} for label in (1, 0)])
    rows, _, names = read(tokenizer, ids, labels=["bad", "good"])
    assert (names, rows.labels.tolist()) == (["bad", "good"], [1, 0])
    rows, _, names = read(tokenizer, ids, labels=["1", "0"])  # these numbers are names
    assert rows.labels.tolist() == [0, 1]

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    saved = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    saved.to_parquet(tmp_path / "saved.parquet")
    for source in ("saved", "saved.parquet"):
        rows, _, names = read(tokenizer, str(tmp_path / source))
        assert (names, rows.labels.tolist()) == (["a", "z"], [1, 0])


def test_several_labels(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lists = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}, {"text": "c", "label": ["y"]}]
    rows, _, names = read(tokenizer, write(tmp_path / "l.jsonl", lists), MULTI)
    assert names == ["x", "y"]
    assert rows.labels.tolist() == [[1, 1], [0, 0], [0, 1]]
    columns = write(tmp_path / "c.csv", [{"text": "a", "x": 1, "y": 0}, {"text": "b", "x": 0, "y": 1}])
    rows, _, names = read(tokenizer, columns, MULTI, label_field=["x", "y"])
    assert (names, rows.labels.tolist()) == (["x", "y"], [[1, 0], [0, 1]])


def test_numbers_to_regress_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "r.csv", [{"text": "a", "score": 1.5, "more": -2}, {"text": "b", "score": 3, "more": 0}])
    rows, _, names = read(tokenizer, source, "regression", label_field="score")
    assert (names, rows.labels.tolist()) == (["score"], [[1.5], [3]])
    rows, _, names = read(tokenizer, source, "regression", label_field=["score", "more"])
    assert (names, rows.labels.tolist()) == (["score", "more"], [[1.5, -2], [3, 0]])


def test_pairs_keep_a_separator_and_share_the_room(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "p.jsonl", [{"text": "a cat", "other": "a dog", "label": label} for label in "xy"])
    rows, _, _ = read(tokenizer, source, second_text_field="other")
    first, second = tokenizer.encode("a cat"), tokenizer.encode("a dog")
    assert rows.token_ids[0].tolist() == [*first, tokenizer.eos_id, *second]

    def pair(first: list[int], second: list[int], length: int) -> list[int]:
        return join_pair(first, second, separator=-1, length=length)

    assert pair([1, 2, 3], [4, 5, 6, 7, 8], 7) == [1, 2, 3, -1, 4, 5, 6]
    assert pair([1, 2, 3, 4, 5], [6], 5) == [1, 2, 3, -1, 6]
    assert pair([1, 2, 3, 4], [5, 6, 7, 8], 5) == [1, 2, -1, 5, 6]
    for length in range(3, 12):
        row = pair([*range(5)], [*range(7)], length)
        assert len(row) == min(length, 13)
        assert row[-1] != -1


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        ([{"text": "a", "label": "x"}, {"text": "", "label": "y"}], {}, r"rows.jsonl row 2: no text in 'text'"),
        (
            [{"body": "a", "label": "x"}],
            {},
            r"row 1: no text in 'text', the fields with a value are body, label; set data.text_field",
        ),
        (
            [{"text": "a", "label": None}],
            {},
            r"row 1: no 'label', the fields with a value are text; set data.label_field",
        ),
        ([{"text": "a", "label": "x"}] * 2, {}, r"the labels are \['x'\]; two or more"),
        ([{"text": "a", "label": "z"}], {"labels": ["x", "y"]}, r"row 1: label 'z' is none of x, y; correct it"),
        ([{"text": "a", "label": 2}], {"labels": ["x", "y"]}, r"row 1: label 2 is none of x, y"),
        ([{"text": "a", "label": 0.5}], {}, r"row 1: the label must be a name or a number, got 0.5"),
        ([{"text": "a", "label": ["x"]}], {}, r"row 1: the label must be a name or a number, got \['x'\]"),
        (
            [{"text": "a", "label": "x"}],
            {"problem": MULTI},
            r"row 1: the label must be a list of labels, got 'x'",
        ),
        ([{"text": "a", "label": [0, 1, 1]}], {"problem": MULTI}, r"row 1: a label twice in \[0, 1, 1\]"),
        ([{"text": "a", "x": 2}], {"problem": MULTI, "label_field": ["x"]}, r"row 1: .* must hold 0 or 1, got \[2\]"),
        ([{"text": "a", "label": "x"}], {"problem": "regression"}, r"row 1: the label must be a number or numbers"),
        (
            [{"text": "a", "label": [1.0]}, {"text": "a", "label": [1.0, 2]}],
            {"problem": "regression"},
            r"row 2: 2 numb",
        ),
        ([{"text": "a", "x": 1}], {"label_field": ["x", "y"]}, "several fields are for multi_label"),
        ([], {}, r"data.train: no rows in"),
    ],
)
def test_a_mistake_is_named(
    tmp_path: Path, tokenizer: Tokenizer, rows: list[dict[str, Any]], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(tokenizer, write(tmp_path / "rows.jsonl", rows), **given)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"data.train: no .jsonl, .csv or .parquet file"):
        read(tokenizer, str(tmp_path / "nowhere.csv"))
    for name in ("bad.jsonl", "bad.parquet"):
        (tmp_path / name).write_text('{"text": "a", "label": "x"}\n{"text": \n')
        with pytest.raises(UserError, match=rf"{name}: cannot be read \(.+\)") as error:
            read(tokenizer, str(tmp_path / name))
        assert "\n" not in str(error.value)
    both = datasets.DatasetDict({split: datasets.Dataset.from_list(ROWS) for split in ("test", "train")})
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"several splits; name one of them: .*both/test, .*both/train"):
        read(tokenizer, str(tmp_path / "both"))
    assert len(read(tokenizer, str(tmp_path / "both/train"))[0]) == len(ROWS)


def test_rows_are_truncated_to_the_length(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "long.jsonl", [{"text": "a cat " * 9, "label": label} for label in "xy"])
    whole, cut = (read(tokenizer, source, length=length)[0].token_ids[0] for length in (64, 5))
    assert np.array_equal(cut, whole[:5])
