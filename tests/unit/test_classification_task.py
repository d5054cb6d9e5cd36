"""Metrics equal scikit-learn's, class weights equal torch's; neither depends on ranks and batches."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from gptj_train import GPTJConfig, GPTJForSequenceClassification, GPTJModel
from gptj_train.data.labelled import LabelledRows
from gptj_train.data.sampler import Sampler
from gptj_train.tasks.classification import (
    Classification,
    ClassificationTaskConfig,
    class_weights,
    known_labels,
    predictions,
)
from gptj_train.tasks.classification_metrics import classification_metrics

SINGLE, MULTI = "single_label_classification", "multi_label_classification"
NAMES = ["a", "b", "c"]
PAD = 0


def task_config(problem: str = SINGLE, weights: Any = None) -> ClassificationTaskConfig:
    return ClassificationTaskConfig(problem_type=problem, labels=None, class_weights=weights)  # type: ignore[arg-type]


def random_rows(problem: str, count: int) -> LabelledRows:
    random = np.random.default_rng(0)
    ids = [random.integers(1, 31, size=random.integers(1, 9), dtype=np.int32) for _ in range(count)]
    labels = {
        SINGLE: random.integers(3, size=count),
        MULTI: random.integers(2, size=(count, 3)).astype(np.float32),
        "regression": random.normal(size=(count, 3)).astype(np.float32),
    }
    return LabelledRows(ids, labels[problem])


def make_task(problem: str, rows: LabelledRows, weights: Any = None) -> Classification:
    return Classification(
        train=rows,
        sampler=Sampler([len(rows)], seed=0, global_batch_size=4, micro_batch_size=2),
        validation=rows,
        names=NAMES,
        config=task_config(problem, weights),
        pad_id=PAD,
        batch_size=2,
    )


def make_model(problem: str) -> GPTJForSequenceClassification:
    shape = {"vocab_size": 31, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}
    config = GPTJConfig(**shape, id2label=dict(enumerate(NAMES)), problem_type=problem, pad_token_id=PAD)  # type: ignore[arg-type]
    return GPTJForSequenceClassification(config).eval()


@pytest.mark.filterwarnings("ignore:A single label")
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("case", ["random", "one class predicted", "class absent", "all right", "all wrong"])
def test_single_label_metrics(classes: int, case: str) -> None:
    labels = torch.randint(classes, (57,))
    logits = torch.randn(57, classes)
    if case == "one class predicted":
        logits[:, 0] = 9
    elif case == "class absent":
        labels = labels.clamp(max=classes - 2)
        logits[:, -1] = -9
    elif case.startswith("all"):
        logits = F.one_hot(labels if case == "all right" else (labels + 1) % classes, classes).float()
    names = [f"n{label}" for label in range(classes)]
    found = classification_metrics(SINGLE, 57.0, logits, labels, names)
    predicted = logits.argmax(1)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(labels, predicted, average="macro", zero_division=0))
    assert found["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, predicted), abs=1e-6)
    assert found["eval_loss"] == 1.0
    matrix = [[found["confusion_matrix"][true].get(name, 0) for name in names] for true in names]
    assert matrix == sk.confusion_matrix(labels, predicted, labels=range(classes)).tolist()


def test_multi_label_metrics() -> None:
    labels = (torch.rand(83, 4) < torch.tensor([0.1, 0.5, 0.3, 0.02])).float()
    logits = torch.randn(83, 4) + labels - 1
    found = classification_metrics(MULTI, 1.0, logits, labels, list("abcd"))
    probabilities = logits.sigmoid().numpy()

    def f1(threshold: float, average: str) -> float:
        return sk.f1_score(labels, probabilities > threshold, average=average, zero_division=0)

    assert found["micro_f1"] == pytest.approx(f1(0.5, "micro"))
    assert found["macro_f1"] == pytest.approx(f1(0.5, "macro"))
    assert found["best_micro_f1"] == pytest.approx(max(f1(hundredth / 100, "micro") for hundredth in range(1, 100)))
    assert found["best_micro_f1"] == pytest.approx(f1(found["best_threshold"], "micro"))
    assert found["best_macro_f1"] == pytest.approx(f1(found["best_threshold"], "macro"))
    assert found["best_micro_f1"] > found["micro_f1"] + 0.02


@pytest.mark.parametrize("width", [1, 3])
def test_regression_metrics(width: int) -> None:
    labels = torch.randn(41, width).round(decimals=1)  # with ties
    predicted = labels + torch.randn(41, width)
    found = classification_metrics("regression", 1.0, predicted, labels, NAMES[:width])
    columns = [(predicted[:, i].numpy(), labels[:, i].numpy()) for i in range(width)]
    assert found["mse"] == pytest.approx(sk.mean_squared_error(labels, predicted))
    assert found["pearson"] == pytest.approx(np.mean([stats.pearsonr(*pair)[0] for pair in columns]), abs=1e-5)
    assert found["spearman"] == pytest.approx(np.mean([stats.spearmanr(*pair)[0] for pair in columns]), abs=1e-5)


def label_as_written(problem: str, label: Any) -> Any:
    """A label as predictions.jsonl names it."""
    if problem == SINGLE:
        return NAMES[label]
    named = dict(zip(NAMES, label.tolist(), strict=True))
    return named if problem == "regression" else [name for name, flag in named.items() if flag]


def test_predictions() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 0.1]])
    (first, second) = predictions(SINGLE, logits, torch.tensor([2, 0]), NAMES)
    assert (first["row"], first["label"], first["predicted"]) == (1, "c", "b")
    assert list(first["scores"].values()) == pytest.approx(logits[0].softmax(0).tolist())
    assert (second["row"], second["label"], second["predicted"]) == (2, "a", "a")
    (_, both) = predictions(MULTI, logits, torch.tensor([[0.0, 1, 0], [1, 1, 0]]), NAMES)
    assert (both["label"], both["predicted"]) == (["a", "b"], ["a", "c"])
    assert both["scores"]["b"] == pytest.approx(1 / (1 + math.e))
    (number, _) = predictions("regression", logits, torch.tensor([[1.0, 2, 3], [4, 5, 6]]), NAMES)
    assert number == {"row": 1, "label": {"a": 1, "b": 2, "c": 3}, "predicted": {"a": 0, "b": 2, "c": 1}}


@pytest.mark.parametrize("problem", [SINGLE, MULTI, "regression"])
@pytest.mark.parametrize("weights", [None, {"b": 3.0, "c": 0.0}])
def test_evaluation_is_exact_on_any_number_of_ranks(problem: str, weights: Any) -> None:
    weights = None if problem == "regression" else weights
    rows, model = random_rows(problem, 11), make_model(problem)
    task = make_task(problem, rows, weights)
    found = []
    for world_size in (1, 2, 4):
        of_rank = [list(task.evaluation_batches(rank, world_size)) for rank in range(world_size)]
        assert len({len(batches) for batches in of_rank}) == 1
        batches = [batch for batches in of_rank for batch in batches]
        assert sum(task.targets(batch.inputs) for batch in batches) == rows.labels.size
        with torch.no_grad():
            records = []
            for batch in batches:
                output = model(**batch.inputs, use_cache=False, num_items_in_batch=1.0)
                records += task.records(output, batch)
        assert sorted(row for record in records for row in record.rows) == list(range(11))
        found.append(task.metrics(records))
        expected = [label_as_written(problem, label) for label in rows.labels]
        assert [(line["row"], line["label"]) for line in task.predictions] == list(enumerate(expected, start=1))
    for other in found[1:]:
        for name, value in found[0].items():
            assert other[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
    if problem == "regression":
        assert found[0]["eval_loss"] == pytest.approx(found[0]["mse"], rel=1e-4)


def test_one_label_of_several() -> None:
    labels = (torch.rand(40, 1) < 0.4).float()
    logits = torch.randn(40, 1)
    found = classification_metrics(MULTI, 1.0, logits, labels, ["only"])
    assert found["micro_f1"] == found["macro_f1"] == pytest.approx(sk.f1_score(labels, logits > 0))


def test_held_out_losses_are_not_weighted() -> None:
    """So that they agree with what evaluates an export, which knows no training data."""
    rows = random_rows(SINGLE, 8)
    weighted, plain = make_task(SINGLE, rows, {"a": 7.0}), make_task(SINGLE, rows)
    for one, other in zip(weighted.evaluation_batches(0, 1), plain.evaluation_batches(0, 1), strict=True):
        assert torch.equal(one.inputs["loss_weights"], other.inputs["loss_weights"])


@pytest.mark.parametrize("problem", [SINGLE, MULTI])
def test_weights_are_torchs(problem: str) -> None:
    rows, model = random_rows(problem, 4), make_model(problem)
    task = make_task(problem, rows, {"a": 2.0, "c": 0.5})
    (*_, batch) = [*task.training_batches(0, 0, 1)]
    output = model(**batch, num_items_in_batch=1.0)
    weights = torch.tensor([2, 1, 0.5])
    expected = (
        F.cross_entropy(output.logits, batch["labels"], weight=weights, reduction="sum")
        if problem == SINGLE
        else F.binary_cross_entropy_with_logits(output.logits, batch["labels"], pos_weight=weights, reduction="sum")
    )
    torch.testing.assert_close(output.loss, expected)


def test_balanced_weights() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [2] * 1)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights(task_config(weights="balanced"), NAMES, labels) == pytest.approx(expected)
    flags = np.array([[1, 0], [1, 1], [1, 0], [0, 0]], dtype=np.float32)
    assert class_weights(task_config(MULTI, "balanced"), NAMES[:2], flags).tolist() == pytest.approx([1 / 3, 3])


def test_a_step_sees_the_same_texts_on_any_number_of_ranks() -> None:
    task = make_task(SINGLE, random_rows(SINGLE, 11))

    def texts(world_size: int) -> list[list[int]]:
        batches = [batch for rank in range(world_size) for batch in task.training_batches(3, rank, world_size)]
        assert all(
            not ids[mask == 0].any()
            for batch in batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        )
        return sorted(ids[ids != PAD].tolist() for batch in batches for ids in batch["input_ids"])

    assert len(texts(1)) == 4
    assert texts(1) == texts(2)


@pytest.mark.parametrize(
    ("problem", "weights", "message"),
    [
        ("regression", "balanced", "regression has no classes"),
        (SINGLE, {"a": -1.0}, "must not be negative"),
        (SINGLE, {"d": 2.0}, "no label named d; there are a, b, c"),
    ],
)
def test_wrong_weights_are_named(problem: str, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_weights(task_config(problem, weights), NAMES, np.zeros(3, dtype=np.int64))


def test_constant_predictions_have_no_correlation() -> None:
    found = classification_metrics("regression", 1.0, torch.zeros(5, 1), torch.randn(5, 1), ["x"])
    assert math.isnan(found["pearson"])


def test_a_head_to_start_from_keeps_its_order_of_labels(tmp_path: Path) -> None:
    assert known_labels(task_config(), None) is None
    GPTJModel(make_model(SINGLE).config).save_pretrained(tmp_path)  # a trunk has no labels
    assert known_labels(task_config(), str(tmp_path)) is None
    shape = {"vocab_size": 31, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    GPTJForSequenceClassification(GPTJConfig(**shape, id2label={0: "z", 1: "a"})).save_pretrained(tmp_path)  # type: ignore[arg-type]
    assert known_labels(task_config(), str(tmp_path)) == ["z", "a"]
    given = ClassificationTaskConfig(problem_type=SINGLE, labels=["a", 2], class_weights=None)  # type: ignore[arg-type]
    assert known_labels(given, str(tmp_path)) == ["a", "2"]
    three = ClassificationTaskConfig(problem_type=SINGLE, labels=["a", "b", "c"], class_weights=None)
    with pytest.raises(ValueError, match=r"task\.labels names 3 labels, the head of .* has 2"):
        known_labels(three, str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": "gptj"}))  # names no class
    assert known_labels(task_config(), str(tmp_path)) is None


def test_a_label_in_yaml_may_be_no_name() -> None:
    with pytest.raises(ValueError, match=r"task\.labels: True is neither a name nor a number"):
        ClassificationTaskConfig(problem_type=SINGLE, labels=[True, False], class_weights=None)
