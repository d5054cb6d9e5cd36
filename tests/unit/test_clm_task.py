"""Training batches and evaluation metrics of the causal LM, by component; the forgetting set is apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from text_data import jsonl, text_data
from torch.nn import functional as F

from gptj_train.data.corpus import TextData, prepare
from gptj_train.data.packing import Windows
from gptj_train.data.sampler import Sampler
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.model.loss import IGNORE, next_token_targets
from gptj_train.tasks.clm import CausalLM, ComponentLoss

LENGTH = 32


@pytest.fixture
def data(tmp_path: Path, tokenizer: Tokenizer) -> TextData:
    for name, count in (("a", 40), ("b", 25), ("c", 3)):
        jsonl(tmp_path / f"{name}.jsonl", *(f"{name} text, number {n} of it " * (1 + n % 4) for n in range(count)))
    paths = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    config = text_data(
        train=paths,
        weights={"a": 3, "b": 1},
        validation=paths[::-1],
        forgetting=str(tmp_path / "c.jsonl"),
        cache_dir=str(tmp_path / "cache"),
    )
    return prepare(config, tokenizer, LENGTH)


def sampler_of(
    components: Mapping[str, Windows],
    weights: Sequence[float] | None = None,
    global_batch_size: int = 8,
    micro_batch_size: int = 2,
) -> Sampler:
    return Sampler(
        [len(windows) for windows in components.values()],
        weights=weights,
        seed=0,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
    )


def task_of(data: TextData, tokenizer: Tokenizer, isolate: bool = True) -> CausalLM:
    return CausalLM(
        train=data.train.windows,
        sampler=sampler_of(data.train.windows, data.weights),
        held_out=data.held_out,
        tokenizer=tokenizer,
        isolate=isolate,
        batch_size=2,
    )


def training_only(components: Mapping[str, Windows], tokenizer: Tokenizer, sampler: Sampler) -> CausalLM:
    return CausalLM(train=components, sampler=sampler, held_out={}, tokenizer=tokenizer, isolate=True, batch_size=1)


def test_a_step_draws_the_mixture_on_any_number_of_ranks(data: TextData, tokenizer: Tokenizer) -> None:
    task, components = task_of(data, tokenizer), list(data.train.windows.values())
    sampler = sampler_of(data.train.windows, [3, 1])
    expected = []
    for position in range(24, 32):
        component, window = sampler.at(position)
        expected.append(components[component][window].tokens.tolist())
    for world_size in (1, 2, 4):
        ranks = [task.training_batches(3, rank, world_size) for rank in range(world_size)]
        rows = [row for turn in zip(*ranks, strict=True) for batch in turn for row in batch["input_ids"].tolist()]
        assert rows == expected


def test_messages_name_training_rows_by_component_and_window(data: TextData, tokenizer: Tokenizer) -> None:
    components = data.train.windows
    names, sampler = list(components), sampler_of(components, [3, 1])
    drawn = [sampler.at(position) for position in range(24, 32)]
    expected = [f"{names[component]}:{window}" for component, window in drawn]
    rows = task_of(data, tokenizer).training_rows(3, 0, 1)
    assert [name for batch in rows for name in batch] == expected
    joined = {"": components["a"]}
    rows = training_only(joined, tokenizer, sampler_of(joined)).training_rows(0, 0, 1)
    assert rows == sampler_of(joined).windows(0, 0, 1)


def test_isolated_documents_predict_nothing_of_each_other(data: TextData, tokenizer: Tokenizer) -> None:
    (batch, *_) = task_of(data, tokenizer).training_batches(0, 0, 1)
    owners, ids = batch["document_ids"], batch["input_ids"]
    targets = next_token_targets(batch["labels"], owners)
    within = (owners[:, 1:] == owners[:, :-1]) & (owners[:, 1:] > 0)
    assert (owners.max(dim=1).values > 1).any()
    assert (targets[:, :-1] == torch.where(within, ids[:, 1:], IGNORE)).all()
    assert (targets[:, -1] == IGNORE).all()


def test_without_isolation_a_window_is_one_text(data: TextData, tokenizer: Tokenizer) -> None:
    isolated, joined = (task_of(data, tokenizer, isolate) for isolate in (True, False))
    for step in range(12):
        for one, other in zip(isolated.training_batches(step, 0, 1), joined.training_batches(step, 0, 1), strict=True):
            assert torch.equal(one["input_ids"], other["input_ids"])
            assert torch.equal(other["document_ids"], (one["document_ids"] > 0).long())
            padding = int((one["document_ids"] == 0).sum())
            assert joined.targets(other) == 2 * (LENGTH - 1) - padding


def test_examples_are_predicted_where_their_masks_say(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"what is {n}?", "response": f" it is {n}"} for n in range(12)]
    file = jsonl(tmp_path / "qa.jsonl", *rows)
    config = text_data(train=str(file), kind="completion", cache_dir=str(tmp_path / "cache"))
    own = prepare(config, tokenizer, LENGTH)
    components = own.train.windows
    every_window = sampler_of(components, global_batch_size=len(components[""]), micro_batch_size=1)
    task = training_only(components, tokenizer, every_window)
    found = []
    for batch in task.training_batches(0, 0, 1):
        targets = next_token_targets(batch["labels"], batch["document_ids"])
        found += tokenizer.decode_all(targets[targets != IGNORE].tolist()).split("<|endoftext|>")[:-1]
        assert task.targets(batch) == int((targets != IGNORE).sum())
    assert sorted(found) == sorted(row["response"] for row in rows)


# --- evaluation ---


def evaluated(task: CausalLM, world_size: int, size: int) -> dict[str, float]:
    """Metrics of a model that predicts each token to repeat."""
    records: list[ComponentLoss] = []
    for rank in range(world_size):
        for batch in task.evaluation_batches(rank, world_size):
            inputs = batch.inputs
            targets = next_token_targets(inputs["labels"], inputs["document_ids"])
            logits = F.one_hot(inputs["input_ids"], size).float()
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
            records += task.records(SimpleNamespace(loss=loss), batch)
    return task.metrics(records)


def by_hand(documents: list[list[int]], tokenizer: Tokenizer) -> tuple[float, int, int]:
    """(summed loss, targets, bytes) of that model on whole documents."""
    size = len(tokenizer)
    total, targets, number = 0.0, 0, 0
    for ids in documents:
        for before, after in pairwise(ids):
            total += math.log(math.e + size - 1) - (before == after)
            targets += 1
            number += int(tokenizer.bytes_per_token[after])
    return total, targets, number


@pytest.mark.parametrize("world_size", [1, 3])
def test_metrics_by_component(data: TextData, tokenizer: Tokenizer, world_size: int) -> None:
    found = evaluated(task_of(data, tokenizer), world_size, len(tokenizer))
    parts = {}
    for name, windows in data.held_out.items():
        pieces = []
        for index in range(len(windows)):
            window = windows[index]
            owners = window.document_ids
            pieces += [window.tokens[owners == owner].tolist() for owner in range(1, owners.max() + 1)]
        parts[name] = by_hand(pieces, tokenizer)
    assert list(parts) == ["b", "a", "forgetting"]
    parts[""] = tuple(sum(column) for column in zip(parts["a"], parts["b"], strict=True))  # without the forgetting set
    expected = {}
    for name, (loss, targets, size) in parts.items():
        end = f"/{name}" if name else ""
        expected |= {
            f"eval_loss{end}": loss / targets,
            f"perplexity{end}": math.exp(loss / targets),
            f"bits_per_byte{end}": loss / math.log(2) / size,
        }
    assert found == pytest.approx(expected, rel=1e-5)


def record(component: str, loss: float, targets: int = 10, size: int = 20) -> ComponentLoss:
    return ComponentLoss(component, loss, targets, size)


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([record("a", 10), record("a", 30)], {"eval_loss": 2.0}),
        ([record("a", 10), record("b", 30, targets=30)], {"eval_loss": 1.0, "eval_loss/a": 1.0, "eval_loss/b": 1.0}),
        (
            [record("a", 9), record("forgetting", 90)],
            {"eval_loss": 0.9, "eval_loss/a": 0.9, "eval_loss/forgetting": 9.0},
        ),
        ([record("forgetting", 90)], {"eval_loss": 9.0}),
        ([record("a", 0, targets=0, size=0)], {"eval_loss": 0.0}),
    ],
)
def test_the_forgetting_set_is_no_part_of_the_total(
    data: TextData, tokenizer: Tokenizer, records: list[ComponentLoss], expected: dict[str, float]
) -> None:
    found: dict[str, Any] = task_of(data, tokenizer).metrics(records)
    assert {name: value for name, value in found.items() if name.startswith("eval_loss")} == expected
    assert {name.partition("/")[2] for name in found} == {name.partition("/")[2] for name in expected}


def test_perplexity_of_a_huge_loss_is_finite(data: TextData, tokenizer: Tokenizer) -> None:
    found = task_of(data, tokenizer).metrics([record("a", 1e6, targets=1)])
    assert found["eval_loss"] == 1e6
    assert math.isfinite(found["perplexity"])
