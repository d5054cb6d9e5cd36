"""A training micro-batch of every task reads nothing back from the device: each read would wait for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gptj_train import GPTJConfig, GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification
from gptj_train.model.batch_facts import BatchFacts, inputs_on

CONFIG = GPTJConfig(
    vocab_size=61,
    n_positions=16,
    n_embd=32,
    n_layer=2,
    n_head=2,
    rotary_dim=8,
    pad_token_id=0,
    num_labels=2,  # a span has start and end
    problem_type="single_label_classification",
)
IDS = torch.randint(1, 61, (2, 16), generator=torch.Generator().manual_seed(0))
RIGHT_PADDED = (torch.arange(16) < torch.tensor([[16], [11]])).long()
PACKED = torch.tensor([[0] * 9 + [1] * 7, [0] * 16])
BATCHES: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "clm": (
        GPTJForCausalLM,
        {"input_ids": IDS, "labels": IDS.masked_fill(IDS < 9, -100), "document_ids": PACKED},
    ),
    "classification": (
        GPTJForSequenceClassification,
        {
            "input_ids": IDS,
            "attention_mask": RIGHT_PADDED,
            "labels": torch.tensor([1, 0]),
            "loss_weights": torch.tensor([1.0, 0.5]),
        },
    ),
    "qa": (
        GPTJForQuestionAnswering,
        {
            "input_ids": IDS,
            "attention_mask": RIGHT_PADDED,
            "start_positions": torch.tensor([2, 3]),
            "end_positions": torch.tensor([5, 3]),
        },
    ),
}
each_task = pytest.mark.parametrize("task", BATCHES)


def loss_of(model: Any, batch: dict[str, Tensor], facts: BatchFacts | None) -> Tensor:
    return model(**batch, facts=facts, use_cache=False, num_items_in_batch=7.0).loss


@each_task
@pytest.mark.parametrize("known", [True, False])
def test_forward_and_backward_read_nothing(task: str, known: bool) -> None:
    """Tensors on the meta device have no numbers: whatever reads one raises."""
    build, batch = BATCHES[task]
    with torch.device("meta"):
        model = build(CONFIG).train()
    moved = inputs_on(torch.device("meta"), batch)
    facts = moved.pop("facts")
    if not known:  # The instrument detects reads where there are some.
        with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|nonzero|item"):
            loss_of(model, moved, None)
        return
    loss_of(model, moved, facts).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


@each_task
def test_facts_change_no_bit(task: str) -> None:
    build, batch = BATCHES[task]
    model = build(CONFIG).train()
    results = []
    for facts in (None, BatchFacts.of(batch)):
        model.zero_grad()
        loss = loss_of(model, batch, facts)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for without, with_facts in zip(*results, strict=True):
        assert torch.equal(without, with_facts)


def test_facts_of_masks() -> None:
    def facts(*rows: list[int]) -> tuple[bool | None, bool | None, bool | None]:
        found = BatchFacts.of({"attention_mask": torch.tensor(rows)})
        return found.padded, found.right_padded, found.starts_real

    assert facts([1, 1], [1, 1]) == (False, True, True)
    assert facts([1, 1, 1], [1, 0, 0]) == (True, True, True)
    assert facts([1, 0, 1], [1, 1, 1]) == (True, False, True)
    assert facts([0, 1, 1], [1, 1, 1]) == (True, False, False)
    assert facts([0, 0, 0], [1, 1, 1]) == (True, True, False)


def test_facts_of_documents_and_labels() -> None:
    facts = BatchFacts.of(BATCHES["clm"][1])
    assert facts.document_lengths == (9, 7, 16)
    assert facts.target_index is not None
    index = facts.target_index.tolist()
    labels = IDS.flatten().tolist()
    # A target is the next token; the first token of a document and of a row is none.
    expected = [at for at in range(32) if at + 1 not in (9, 16, 32) and labels[at + 1] >= 9]
    assert index == expected


@pytest.mark.parametrize("task", ["classification"])
def test_right_padding_needs_no_mask(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense mask would rule out the fastest attention kernels at GPT-J's head size."""
    build, batch = BATCHES[task]
    masks = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        masks.append(attn_mask)
        return plain(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    loss_of(build(CONFIG).train(), batch, BatchFacts.of(batch))
    assert masks == [None, None]
