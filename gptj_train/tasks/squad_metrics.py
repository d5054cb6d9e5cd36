"""Exact match and F1 by the rules of SQuAD's official scripts, v1.1 and v2.0."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower-case a text; remove ASCII punctuation, English articles and extra white space."""
    # In the order of the official scripts: "a.b" becomes the word "ab", not the article "a" and "b".
    without_punctuation = text.lower().translate(_PUNCTUATION)
    without_articles = re.sub(r"\b(a|an|the)\b", " ", without_punctuation)
    return " ".join(without_articles.split())


def squad_scores(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Compute exact match and F1 in percent over all questions of ``answers``.

    If any question has no answer, the rules of v2.0 apply: an empty prediction is right where there is no answer,
    and a reference answer of nothing but articles and punctuation does not count. The scores of questions with
    and without an answer are then reported separately as well.

    Args:
        predictions: predicted text by question id; every question has one.
        answers: reference answers by question id.
    """
    version_2 = not all(answers.values())
    answerable: list[tuple[float, float]] = []
    unanswerable: list[tuple[float, float]] = []
    for question, references in answers.items():
        if not references:
            unanswerable.append(_score(predictions[question], []))
            continue
        if version_2:
            references = [text for text in references if normalised(text)]
        answerable.append(_score(predictions[question], references))
    scores = _mean([*answerable, *unanswerable])
    if answerable and unanswerable:
        of_answerable = _mean(answerable)
        scores["has_answer_exact_match"] = of_answerable["exact_match"]
        scores["has_answer_f1"] = of_answerable["f1"]
        # Its F1 is the same number: both are 1 for an empty prediction and else 0.
        scores["no_answer_exact_match"] = _mean(unanswerable)["exact_match"]
    return scores


def _score(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """Return exact match and F1 against the best reference, 0 to 1 each."""
    predicted = normalised(prediction)
    if not references:
        is_empty = float(not predicted)
        return is_empty, is_empty
    expected = [normalised(reference) for reference in references]
    best_f1 = max(_f1(predicted.split(), reference.split()) for reference in expected)
    return float(predicted in expected), best_f1


def _f1(predicted: list[str], expected: list[str]) -> float:
    """Return the F1 of two bags of words."""
    common = (Counter(predicted) & Counter(expected)).total()
    if common == 0:
        return 0.0
    return 2 * common / (len(predicted) + len(expected))


def _mean(scores: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return the mean exact match and F1 in percent."""
    exact = sum(score for score, _ in scores)
    f1 = sum(score for _, score in scores)
    return {"exact_match": 100 * exact / len(scores), "f1": 100 * f1 / len(scores)}
