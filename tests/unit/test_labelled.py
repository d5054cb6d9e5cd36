"""Labelled rows are read from every kind of file; a mistake is one line that names file and row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import zstandard

from gptj_train.data.held_out_share import HeldOutShare
from gptj_train.data.labelled import LabelledDataConfig, LabelledRows, join_pair, prepare_labelled
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError

SINGLE, MULTI = "single_label_classification", "multi_label_classification"
NO_DATASET = {"dataset": None, "subset": None, "split": "train", "validation_split": None, "revision": None}
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
    given = {"validation": None, "text_field": "text", "second_text_field": None, "label_field": "label"}
    given |= {"bad_records": "error", "max_bad_share": 0.01, **NO_DATASET} | fields
    data = LabelledDataConfig(train=train, **given)
    return prepare_labelled(
        data, problem_type=problem, labels=labels, tokenizer=tokenizer, length=length, held_out=HeldOutShare()
    )


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
        ([{"text": "a", "label": "x"}, {"text": "", "label": "y"}], {}, r"rows.jsonl:2: no text in 'text'"),
        (
            [{"body": "a", "label": "x"}],
            {},
            r":1: no text in 'text'; the fields with a value are body, label; set data.text_field",
        ),
        (
            [{"text": "a", "label": None}],
            {},
            r":1: no 'label'; the fields with a value are text; set data.label_field",
        ),
        ([{"text": "a", "label": "x"}] * 2, {}, r"the labels are \['x'\]; two or more"),
        ([{"text": "a", "label": "z"}], {"labels": ["x", "y"]}, r":1: label 'z' is none of x, y; correct it"),
        ([{"text": "a", "label": 2}], {"labels": ["x", "y"]}, r":1: label 2 is none of x, y"),
        ([{"text": "a", "label": 0.5}], {}, r":1: the label must be a name or a number, got 0.5"),
        ([{"text": "a", "label": ["x"]}], {}, r":1: the label must be a name or a number, got \['x'\]"),
        (
            [{"text": "a", "label": "x"}],
            {"problem": MULTI},
            r":1: the label must be a list of labels, got 'x'",
        ),
        ([{"text": "a", "label": ["x", "x"]}], {"problem": MULTI}, r":1: a label twice in \['x', 'x'\]"),
        ([{"text": "a", "x": 2}], {"problem": MULTI, "label_field": ["x"]}, r":1: .* must hold 0 or 1, got \[2\]"),
        ([{"text": "a", "label": "x"}], {"problem": "regression"}, r":1: the label must be a number or numbers"),
        (
            [{"text": "a", "label": [1.0]}, {"text": "a", "label": [1.0, 2]}],
            {"problem": "regression"},
            r":2: 2 numb",
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
    with pytest.raises(UserError, match=r"data\.train: no file at '.*/nowhere\.csv'"):
        read(tokenizer, str(tmp_path / "nowhere.csv"))
    for name in ("bad.jsonl", "bad.parquet"):
        (tmp_path / name).write_text('{"text": "a", "label": "x"}\n{"text": \n')
        message = rf"{name}:2: not a line of JSON" if name == "bad.jsonl" else rf"{name}: cannot be read as parquet"
        with pytest.raises(UserError, match=message) as error:
            read(tokenizer, str(tmp_path / name))
        assert "\n" not in str(error.value)
    both = datasets.DatasetDict({split: datasets.Dataset.from_list(ROWS) for split in ("test", "train")})
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"several splits; name one of them: .*both/test, .*both/train"):
        read(tokenizer, str(tmp_path / "both"), validation=str(tmp_path / "both"))
    for train in ("both", "both/train"):
        assert len(read(tokenizer, str(tmp_path / train), validation=str(tmp_path / "both/test"))[0]) == len(ROWS)


def test_rows_are_truncated_to_the_length(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "long.jsonl", [{"text": "a cat " * 9, "label": label} for label in "xy"])
    whole, cut = (read(tokenizer, source, length=length)[0].token_ids[0] for length in (64, 5))
    assert np.array_equal(cut, whole[:5])


# --- labels and files as people have them ---


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_flags_for_each_label_are_not_ids(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    two = lines(tmp_path / "two.jsonl", {"text": "a", "label": [0, 1]}, {"text": "b", "label": [1, 0]})
    rows, _, names = read(tokenizer, two, MULTI)
    assert (names, rows.labels.tolist()) == (["0", "1"], [[0, 1], [1, 0]])
    assert "'label' holds a flag of 0 or 1 for each of 2 labels" in capsys.readouterr().out
    three = lines(tmp_path / "three.jsonl", {"text": "a", "label": [0, 1.0, 0]}, {"text": "b", "label": [True, 0, 0]})
    held_out = lines(tmp_path / "held_out.jsonl", {"text": "a", "label": [1, 1, 1]})
    rows, validation, names = read(tokenizer, three, MULTI, labels=["x", "y", "z"], validation=held_out)
    assert (names, rows.labels.tolist()) == (["x", "y", "z"], [[0, 1, 0], [1, 0, 0]])
    assert validation is not None
    assert validation.labels.tolist() == [[1, 1, 1]]
    with pytest.raises(UserError, match=r"held_out.jsonl:1: a list of 3 flags of 0 and 1 is wanted, got \[2\]"):
        read(tokenizer, three, MULTI, validation=lines(Path(held_out), {"text": "a", "label": [2]}))


def test_lists_of_ids_are_not_flags(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ids = lines(tmp_path / "a.jsonl", {"text": "a", "label": [0, 1]}, {"text": "b", "label": [1]})
    assert read(tokenizer, ids, MULTI)[0].labels.tolist() == [[1, 1], [0, 1]]
    single = lines(tmp_path / "b.jsonl", {"text": "a", "label": [0]}, {"text": "b", "label": [1]})
    assert read(tokenizer, single, MULTI)[0].labels.tolist() == [[1, 0], [0, 1]]
    of_three = lines(tmp_path / "c.jsonl", {"text": "a", "label": [0, 1]})
    assert read(tokenizer, of_three, MULTI, labels=["x", "y", "z"])[0].labels.tolist() == [[1, 1, 0]]


@pytest.mark.parametrize("label", ["2021-05-01", "12:30", "1.10", "001", "true", "NaN", "1e3"])
def test_a_label_that_looks_like_something_else_stays_its_text(
    tmp_path: Path, tokenizer: Tokenizer, label: str
) -> None:
    source = lines(tmp_path / "a.jsonl", {"text": label, "label": label}, {"text": "b", "label": "zz"})
    rows, _, names = read(tokenizer, source)
    assert sorted(names) == sorted([label, "zz"])
    assert tokenizer.decode(rows.token_ids[0].tolist()) == label


def test_whole_numbers_with_a_point_are_classes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = lines(tmp_path / "a.jsonl", {"text": "a", "label": 1.0}, {"text": "b", "label": 0})
    rows, _, names = read(tokenizer, source)
    assert (names, rows.labels.tolist()) == (["0", "1"], [1, 0])
    rows, _, names = read(tokenizer, source, labels=["bad", "good"])
    assert (names, rows.labels.tolist()) == (["bad", "good"], [1, 0])
    (tmp_path / "b.csv").write_text("text,label\na,10.0\nb,9.0\n")
    assert read(tokenizer, str(tmp_path / "b.csv"))[2] == ["9", "10"]
    (tmp_path / "b.csv").write_text("text,label\na,1.0\nb,1.5\n")  # versions, perhaps
    assert read(tokenizer, str(tmp_path / "b.csv"))[2] == ["1.0", "1.5"]
    (tmp_path / "b.csv").write_text("text,label\na,1.0\nb,0.0\n")
    assert read(tokenizer, str(tmp_path / "b.csv"), labels=["x", "y"])[0].labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nfine, day,pos\nbad, day,neg\n", ":2: 3 fields, the header has 2; quote the text"),
        ('text,label\n"two\nlines",x\nshort\n', ":4: 1 field, the header has 2; quote the text"),
        ('text,label\n"no end,x\n', ":2: not a row of csv (unexpected end of data); correct its quotes"),
        ("text,text\na,x\n", ":1: two columns have the same name; rename one of text, text"),
    ],
)
def test_a_row_that_does_not_fit_its_header_is_named(
    tmp_path: Path, tokenizer: Tokenizer, content: str, message: str
) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=r"\S") as caught:
        read(tokenizer, str(tmp_path / "a.csv"))
    assert str(caught.value) == f"{tmp_path}/a.csv{message}"


def test_a_column_that_is_not_read_decides_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Null for the first 12 MB, then text, then a list."""
    row = {"text": "a cat", "label": "x", "note": None, "filler": "f" * 2000}
    rows = [row] * 6000 + [row | {"note": "text", "label": "y"}, row | {"note": [1, {"a": 2}]}]
    assert len(read(tokenizer, lines(tmp_path / "large.jsonl", *rows))[0]) == 6002


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'[{"text": "a cat", "label": "x"},\n {"text": "a dog", "label": "y"}]'),
        ("a.JSONL", b'{"text": "a cat", "label": "x"}\r\n{"text": "a dog", "label": "y"}'),
        ("a.csv", b"\xef\xbb\xbftext,label\r\na cat,x\r\na dog,y\r\n"),
        ("a.CSV", b"label,text\nx,a cat\n\ny,a dog\n"),
        ("train[1].csv", b'text,label\n"a cat",x\na dog,y\n'),
        ("a.tsv", b"text\tlabel\na cat\tx\na dog\ty\n"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a cat", "label": "x"}\n{"text": "a dog", "label": "y"}\n')),
        ("a.Csv.zst", zstandard.compress(b"text,label\na cat,x\na dog,y\n")),
    ],
)
def test_files_as_people_have_them(tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        rows, _, names = read(tokenizer, str(path))
        assert (names, rows.labels.tolist()) == (["x", "y"], [0, 1])
        assert [tokenizer.decode(ids.tolist()) for ids in rows.token_ids] == ["a cat", "a dog"]


def test_fields_inside_others(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"review": {"body": f"a {label}"}, "meta.label": label} for label in ("cat", "dog")]
    source = lines(tmp_path / "a.jsonl", *rows)
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    for file in (source, str(tmp_path / "a.parquet")):
        found, _, names = read(tokenizer, file, text_field="review.body", label_field="meta.label")
        assert (names, found.labels.tolist()) == (["cat", "dog"], [0, 1])
        assert tokenizer.decode(found.token_ids[1].tolist()) == "a dog"


def test_texts_keep_every_line_separator(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "a\u2028b\u0085c\x0cd\re"
    (tmp_path / "a.csv").write_bytes(f'text,label\n"{text}",x\nb,y\n'.encode())
    assert tokenizer.decode(read(tokenizer, str(tmp_path / "a.csv"))[0].token_ids[0].tolist()) == text


def test_an_empty_second_text_is_an_empty_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pairs = [{"text": "a cat", "other": "", "label": "x"}, {"text": "a", "other": "b", "label": "y"}]
    rows, _, _ = read(tokenizer, lines(tmp_path / "a.jsonl", *pairs), second_text_field="other")
    assert rows.token_ids[0].tolist() == [*tokenizer.encode("a cat"), tokenizer.eos_id]
    missing = lines(tmp_path / "a.jsonl", pairs[0] | {"other": None})
    with pytest.raises(UserError, match=r":1: no text in 'other'; .*; set data.second_text_field"):
        read(tokenizer, missing, second_text_field="other")


def test_bad_records_are_left_out_up_to_a_share(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    source = lines(tmp_path / "a.jsonl", *good, {"text": "", "label": "x"}, {"text": "c", "label": float("nan")})
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("broken\n")
    assert len(read(tokenizer, source, bad_records="skip", max_bad_share=0.6)[0]) == 2
    reasons = "1 x no text in 'text', 1 x no 'label', 1 x not a line of JSON"
    assert f"data.train: 3 of 5 records left out ({reasons})" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data.train: 60.00% of the records are bad \(1 x no text"):
        read(tokenizer, source, bad_records="skip", max_bad_share=0.5)


def test_fields_with_text_that_is_not_read_are_named(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "a", "hypothesis": "b", "n": 1, "empty": "", "label": label} for label in "xy"]
    read(tokenizer, lines(tmp_path / "a.jsonl", *rows))
    said = "data.train: text that is not read, in the fields hypothesis"
    assert said in capsys.readouterr().out.splitlines()
    read(tokenizer, lines(tmp_path / "a.jsonl", *rows), second_text_field="hypothesis")
    assert "not read" not in capsys.readouterr().out
