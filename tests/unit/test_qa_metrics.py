"""Exact match, F1 and the choice of answers equal those of SQuAD's official scripts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torchmetrics.functional.text import squad

from gptj_train.data.squad import Question
from gptj_train.data.squad_features import Features
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.tasks.question_answering import QATaskConfig, QuestionAnswering, best_spans
from gptj_train.tasks.squad_metrics import normalised, squad_scores

# Words that the rules treat each in their own way.
words = st.sampled_from(
    ["the", "The", "a", "an", "An", "cat", "Cat", "cat's", "U.S.", "-", "—", "naïve", "", "\u00a0", "10"]
)
phrases = st.lists(words, max_size=5).map(" ".join)


answers_of_a_question = st.lists(phrases.filter(str.strip), max_size=3)


def reference_scores(predictions: dict[str, str], answers: dict[str, list[str]]) -> dict[str, float]:
    predicted = [{"id": name, "prediction_text": text} for name, text in predictions.items()]
    wanted = [{"id": name, "answers": {"text": texts, "answer_start": []}} for name, texts in answers.items()]
    return {name: value.item() for name, value in squad(predicted, wanted).items()}  # type: ignore[union-attr]


@given(st.lists(st.tuples(phrases, answers_of_a_question), min_size=1, max_size=4))
def test_scores_equal_the_reference(cases: list[tuple[str, list[str]]]) -> None:
    predictions = {str(i): predicted for i, (predicted, _) in enumerate(cases)}
    answers = {str(i): wanted for i, (_, wanted) in enumerate(cases)}
    scores = squad_scores(predictions, answers)
    if all(answers.values()):
        # The reference has v2's F1 of two empty texts, 1, where evaluate-v1.1.py has 0.
        assume(all(map(normalised, predictions.values())))
        kept = answers
    else:
        kept = {name: [text for text in texts if normalised(text)] or [""] for name, texts in answers.items()}
    reference = reference_scores(predictions, kept)
    assert scores["exact_match"] == pytest.approx(reference["exact_match"])
    assert scores["f1"] == pytest.approx(reference["f1"])


def test_v1_gives_no_f1_for_texts_of_articles_alone() -> None:
    assert squad_scores({"q": "a"}, {"q": ["the"]}) == {"exact_match": 100, "f1": 0}


# prediction, answers, exact match, F1, as evaluate-v2.0.py gives them
V2 = [
    ("", [], 1, 1),
    ("the", [], 1, 1),
    (" -", [], 1, 1),
    ("cat", [], 0, 0),
    ("", ["cat"], 0, 0),
    ("the", ["cat"], 0, 0),
    ("A cat!", ["the Cat"], 1, 1),
    ("black cat", ["cat", "white cat"], 0, 2 / 3),
    ("cat cat", ["cat"], 0, 2 / 3),
    ("an", ["the"], 1, 1),
    ("", ["the", "cat"], 0, 0),
    ("cat", ["the", "cat"], 1, 1),
]


@pytest.mark.parametrize(("prediction", "answers", "exact", "f1"), V2)
def test_v2_scores(prediction: str, answers: list[str], exact: float, f1: float) -> None:
    # The second question makes the data v2; its prediction is wrong, and so halves the scores.
    scores = squad_scores({"q": prediction, "other": "wrong"}, {"q": answers, "other": []})
    assert scores["exact_match"] == pytest.approx(50 * exact)
    assert scores["f1"] == pytest.approx(50 * f1)


def test_v2_reports_both_kinds() -> None:
    scores = squad_scores({"a": "cat", "b": "bird", "c": ""}, {"a": ["cat"], "b": ["dog"], "c": []})
    assert scores == pytest.approx(
        {
            "exact_match": 200 / 3,
            "f1": 200 / 3,
            "has_answer_exact_match": 50,
            "has_answer_f1": 50,
            "no_answer_exact_match": 100,
        }
    )


def test_normalisation_is_the_official_one() -> None:
    assert normalised("The U.S.'s  «A-team»\tan\u00a0anthem") == "uss «ateam» anthem"
    assert normalised("a.b the") == "ab"


@given(st.integers(1, 12), st.integers(1, 15), st.integers(1, 20), st.integers(0, 2**32))
def test_the_best_spans_are_those_of_all(length: int, longest: int, n_best: int, seed: int) -> None:
    start, end = torch.randn(2, length, generator=torch.Generator().manual_seed(seed))
    every = [
        (float(start[i] + end[j]), i, j) for i, j in itertools.product(range(length), repeat=2) if i <= j < i + longest
    ]
    assert best_spans(start, end, n_best, longest) == sorted(every, reverse=True)[:n_best]


CONTEXT = "one two three four five six seven eight nine ten"


def evaluated(threshold: float | None, null: list[float], places: dict[str, float]) -> QuestionAnswering:
    """The task after an evaluation in which each window gave its null slot and each word its score."""
    asked = [
        Question("q", "Which?", CONTEXT, ("five six",), CONTEXT.index("five")),
        Question("r", "Why?", "no", (), None),
    ]
    tokenizer = Tokenizer.train(["one two three four five six seven eight nine ten Which? Why? no\n"] * 5, 320)
    features = Features(asked, tokenizer, length=12, doc_stride=3, max_question_tokens=4, repeat_context=False)
    config = QATaskConfig(
        doc_stride=3,
        max_question_tokens=4,
        max_answer_tokens=2,
        n_best=3,
        null_threshold=threshold,
        repeat_context=False,
    )
    task = QuestionAnswering(validation=features, config=config, batch_size=4)
    records: list[Any] = []
    seen = 0
    for rank in range(2):
        for batch in task.evaluation_batches(rank, 2):
            logits = torch.full(batch.inputs["input_ids"].shape, -6.0)
            for row, number in enumerate(batch.source):
                if number is None:
                    continue
                seen += 1
                feature = features[number]
                for token, (first, end) in enumerate(feature.offsets):
                    word = asked[feature.question].context[first:end].strip()
                    logits[row, feature.context_start + token] = places.get(word, -6.0)
                logits[row, len(feature.input_ids) - 1] = null[min(number, len(null) - 1)]
            output = SimpleNamespace(loss=torch.tensor(1.0), start_logits=logits, end_logits=logits)
            records += task.records(output, batch)
    assert seen == len(features)
    task.metrics(records)
    return task


def test_the_best_span_of_all_windows_answers_unless_no_answer_beats_it_in_every_window() -> None:
    words = {"five": 2.0, "six": 1.0, "nine": 1.4}
    assert evaluated(0.0, [-5.0], words).predictions == {"q": "five", "r": ""}
    # The null score of a question is its lowest: a window without the answer may lower it.
    assert evaluated(0.0, [9.0, -4.0, 9.0], words).predictions["q"] == "five"
    assert evaluated(0.0, [2.5], words).predictions["q"] == ""
    assert evaluated(1.5, [2.5], words).predictions["q"] == "five"
    always = evaluated(None, [9.0], words).predictions
    assert always["q"] == "five"
    assert always["r"] in ("n", "o", "no")


def test_predictions_are_written_as_the_official_scripts_read_them(tmp_path: Path) -> None:
    task = evaluated(0.0, [-5.0], {"five": 2.0, "six": 1.0})
    task.write_predictions(tmp_path)
    assert json.loads((tmp_path / "predictions.json").read_text()) == {"q": "five", "r": ""}
    best = json.loads((tmp_path / "nbest_predictions.json").read_text())["q"]
    assert [candidate["text"] for candidate in best] == ["five", "five six", "six"]
    assert [candidate["score"] for candidate in best] == [4.0, 3.0, 2.0]


def test_rows_that_fill_a_batch_up_have_no_target_and_padding_comes_last() -> None:
    task = evaluated(0.0, [-5.0], {})
    batches = [batch for rank in range(2) for batch in task.evaluation_batches(rank, 2)]
    assert sum(task.targets(batch.inputs) for batch in batches) == len(task._validation)
    for batch in batches:
        mask, end = batch.inputs["attention_mask"], batch.inputs["end_positions"]
        assert (mask[:, 1:] <= mask[:, :-1]).all()
        assert mask.any(dim=1).all()
        for row in range(len(mask)):
            length = int(mask[row].sum())
            assert end[row] < length or (batch.source[row] is None and end[row] == mask.shape[1])
            assert (batch.inputs["input_ids"][row, length:] == task._validation.padding_id).all()
