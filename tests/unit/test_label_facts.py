"""Class counts, baselines, truncated texts, and the correlation of each number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from gptj_train.data.labelled import LabelledRows
from gptj_train.tasks.classification_metrics import classification_metrics
from gptj_train.tasks.label_facts import label_facts


def rows(labels: np.ndarray, truncated: int = 0) -> LabelledRows:
    return LabelledRows([np.array([1], dtype=np.int32)] * len(labels), labels, truncated)


def test_class_counts_and_the_majority_baseline() -> None:
    facts = label_facts(rows(np.array([1, 1, 1, 0]), 2), rows(np.array([1, 0, 0, 0]), 1), ["no", "yes"])
    assert facts == {
        "data": "4 texts to train on, 4 held out",
        "labels": "2: yes 3, no 1",
        "baseline": "accuracy 0.250 by always answering 'yes', of the held-out texts",
        "truncated": "3 of 8 texts are longer than sequence_length; their end is not read",
    }


def test_numbers_have_means_and_a_baseline() -> None:
    train, held_out = np.array([[1.0, 10.0], [3.0, 30.0]]), np.array([[2.0, 22.0]])
    facts = label_facts(rows(train), rows(held_out), ["a", "b"])
    assert facts["labels"] == "2: mean a 2, b 20"
    assert facts["baseline"] == "mse 2 by always answering the mean, of the held-out texts"


def test_each_number_has_its_correlation() -> None:
    torch.manual_seed(0)
    labels = torch.randn(20, 2)
    predicted = torch.stack([labels[:, 0] + 0.1 * torch.randn(20), torch.randn(20)], dim=1)
    metrics = classification_metrics("regression", 1.0, predicted, labels, ["good", "bad"])
    for column, name in enumerate(["good", "bad"]):
        x, y = predicted[:, column].numpy(), labels[:, column].numpy()
        assert metrics[f"pearson/{name}"] == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-5)
        assert metrics[f"spearman/{name}"] == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-5)
    assert metrics["pearson"] == pytest.approx((metrics["pearson/good"] + metrics["pearson/bad"]) / 2)
