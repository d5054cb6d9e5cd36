"""Exact match and F1 by the rules of SQuAD's official scripts, v1.1 and v2.0."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case without ASCII punctuation, English articles and superfluous white space."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def squad_scores(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Percentages over all questions of ``answers``; each has a prediction.

    The v2.0 rules apply once a question has no answer, and then both kinds are reported apart as well: an empty
    prediction is right where there is no answer, and an answer of nothing but articles and punctuation is none.
    """
    version_2 = not all(answers.values())
    answerable: list[tuple[float, float]] = []
    unanswerable: list[tuple[float, float]] = []
    for name, texts in answers.items():
        wanted = [text for text in texts if normalised(text)] if version_2 else texts
        (answerable if texts else unanswerable).append(_score(predictions[name], wanted))
    scores = _mean(answerable + unanswerable)
    if answerable and unanswerable:
        scores |= {f"has_answer_{name}": score for name, score in _mean(answerable).items()}
        scores["no_answer_exact_match"] = _mean(unanswerable)["exact_match"]
    return scores


def _score(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """Best exact match and F1 over the answers, each 0 to 1."""
    said = normalised(prediction)
    if not answers:
        return float(not said), float(not said)
    wanted = [normalised(answer) for answer in answers]
    return float(said in wanted), max(_f1(said.split(), answer.split()) for answer in wanted)


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


def _mean(scores: Sequence[tuple[float, float]]) -> dict[str, float]:
    exact, f1 = (100 * sum(column) / len(scores) for column in zip(*scores, strict=True))
    return {"exact_match": exact, "f1": f1}
