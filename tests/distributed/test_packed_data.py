"""The real task on packed text: what two ranks evaluate is what one process does."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Results
from toy import LENGTH, packed_task, toy_config

from gptj_train import GPTJForCausalLM
from gptj_train.data.tokenizer import Tokenizer

pytestmark = pytest.mark.distributed


def test_uneven_packed_evaluation_is_exact(results: Results) -> None:
    """2 ranks x 2 windows at once do not divide the windows; the last ones are filled up with nothing."""
    folder = results.folder / "text"
    task = packed_task(folder, micro_batch_size=1)
    model = GPTJForCausalLM(toy_config(vocab_size=len(Tokenizer.load(folder)))).eval()
    model.load_state_dict(results.weights("packed"))
    with torch.no_grad():
        windows = list(task.evaluation_batches(0, 1))
        records = [
            row
            for batch in windows
            for row in task.records(model(**batch, use_cache=False, num_items_in_batch=1.0), batch)
        ]
    assert len(windows) % 4 != 0
    seen = results.of("packed")["seen"]
    assert seen == results.of("packed", rank=1)["seen"]
    for column, exact in ((1, sum(record[1] for record in records)), (2, sum(record[2] for record in records))):
        assert sum(row[column] for row in seen) == exact
    alone = task.metrics(records)
    together = results.of("packed")["evaluation"]
    assert together == pytest.approx(alone, rel=1e-6)
    assert together["perplexity"] == pytest.approx(math.exp(together["eval_loss"]))


def test_a_step_counts_the_targets_of_its_windows(results: Results) -> None:
    """Neither padding nor the first token of a document is a target."""
    task = packed_task(results.folder / "text", micro_batch_size=4)
    for step, line in enumerate(results.of("packed")["steps"]):
        (batch,) = task.training_batches(step, 0, 1)
        ids = batch["document_ids"]
        targets = int(((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)).sum())
        before = results.of("packed")["steps"][step - 1]["tokens"] if step else 0
        assert line["tokens"] - before == targets < 4 * (LENGTH - 1)
