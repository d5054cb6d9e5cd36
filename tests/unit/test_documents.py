"""Documents packed into one row see nothing of each other, not by one bit, and score as they do alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.model.attention import attention_pattern
from gptj_train.model.document_positions import document_lengths, document_starts, positions_in_documents

VOCAB = 101
# Ids are names of runs: an id that comes again later, or in another row, is another document.
DOCUMENTS = torch.tensor(
    [
        [0] * 5 + [1] * 1 + [2] * 8 + [3] * 2,
        [0] * 16,
        [4] * 7 + [9] * 3 + [4] * 6,
    ]
)
PATHS = pytest.mark.parametrize("eager", [False, True], ids=["per-document", "dense-mask"])


@pytest.fixture(scope="module", params=[4, 8], ids=["rotary-half", "rotary-full"])
def model(request: pytest.FixtureRequest) -> GPTJForCausalLM:
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=3, n_head=4, rotary_dim=request.param)
    model = GPTJForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(VOCAB, DOCUMENTS.shape)


def spans() -> Iterator[tuple[int, slice]]:
    """Row and columns of each document."""
    for row, documents in enumerate(DOCUMENTS.tolist()):
        start = 0
        for _, run in itertools.groupby(documents):
            length = len(list(run))
            yield row, slice(start, start + length)
            start += length


SPANS = list(spans())


def logits_and_states(model: GPTJForCausalLM, ids: Tensor, eager: bool) -> list[Tensor]:
    out = model(ids, document_ids=DOCUMENTS, output_attentions=eager, output_hidden_states=True)
    return [out.logits, *out.hidden_states]


@PATHS
@pytest.mark.parametrize("changed", SPANS)
def test_changing_a_document_changes_no_bit_elsewhere(
    model: GPTJForCausalLM, ids: Tensor, changed: tuple[int, slice], eager: bool
) -> None:
    other = ids.clone()
    other[changed] = (other[changed] + 1 + torch.randint(VOCAB - 1, other[changed].shape)) % VOCAB
    elsewhere = torch.ones_like(ids, dtype=torch.bool)
    elsewhere[changed] = False
    before, after = (logits_and_states(model, tokens, eager) for tokens in (ids, other))
    for ours, theirs in zip(before, after, strict=True):
        assert torch.equal(ours[elsewhere], theirs[elsewhere])
        assert not torch.equal(ours[changed], theirs[changed])


@PATHS
@pytest.mark.parametrize("scored", SPANS)
def test_gradients_never_cross_documents(
    model: GPTJForCausalLM, ids: Tensor, scored: tuple[int, slice], eager: bool
) -> None:
    embeddings = model.transformer.wte(ids).detach().requires_grad_()
    out = model(inputs_embeds=embeddings, document_ids=DOCUMENTS, output_attentions=eager)
    out.logits[scored].square().sum().backward()
    inside = torch.zeros_like(ids, dtype=torch.bool)
    inside[scored] = True
    assert (embeddings.grad[~inside] == 0).all()
    assert (embeddings.grad[inside] != 0).any(dim=1).all()


@PATHS
def test_loss_gradients_never_cross_documents(model: GPTJForCausalLM, ids: Tensor, eager: bool) -> None:
    for row, columns in SPANS:
        labels = torch.full_like(ids, -100)
        labels[row, columns] = ids[row, columns]
        embeddings = model.transformer.wte(ids).detach().requires_grad_()
        arguments = {"labels": labels, "document_ids": DOCUMENTS, "output_attentions": eager}
        model(inputs_embeds=embeddings, num_items_in_batch=1, **arguments).loss.backward()
        inside = torch.zeros_like(ids, dtype=torch.bool)
        inside[row, columns.start : columns.stop - 1] = True  # the last token predicts nothing
        assert (embeddings.grad[~inside] == 0).all()
        assert (embeddings.grad[inside] != 0).any(dim=1).all()


@PATHS
def test_packed_equals_alone(model: GPTJForCausalLM, ids: Tensor, eager: bool) -> None:
    packed = logits_and_states(model, ids, eager)
    for row, columns in SPANS:
        out = model(ids[row : row + 1, columns], output_hidden_states=True)
        for ours, alone in zip(packed, [out.logits, *out.hidden_states], strict=True):
            torch.testing.assert_close(ours[row : row + 1, columns], alone, atol=1e-5, rtol=1e-5)


@PATHS
def test_loss_and_gradients_are_sums_over_documents(model: GPTJForCausalLM, ids: Tensor, eager: bool) -> None:
    model.zero_grad()
    arguments = {"labels": ids, "document_ids": DOCUMENTS, "output_attentions": eager}
    packed = model(ids, num_items_in_batch=1, **arguments).loss
    packed.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = torch.tensor(0.0)
    targets = 0
    for row, columns in SPANS:
        document = ids[row : row + 1, columns]
        alone = alone + model(document, labels=document, num_items_in_batch=1).loss
        targets += document.shape[1] - 1
    alone.backward()
    torch.testing.assert_close(packed, alone, atol=0, rtol=1e-5)
    for name, parameter in model.named_parameters():
        gap = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max()
        assert gap < 2e-5, name
    mean = model(ids, **arguments).loss
    torch.testing.assert_close(mean, packed / targets)


def test_dense_mask_equals_per_document(model: GPTJForCausalLM, ids: Tensor) -> None:
    split, dense = (logits_and_states(model, ids, eager) for eager in (False, True))
    for ours, theirs in zip(split, dense, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_attention_weights_are_zero_across_documents(model: GPTJForCausalLM, ids: Tensor) -> None:
    attentions = model(ids, document_ids=DOCUMENTS, output_attentions=True).attentions
    inside = torch.zeros(3, 16, 16, dtype=torch.bool)
    for row, columns in SPANS:
        inside[row, columns, columns] = True
    inside = inside.tril()[:, None].expand(-1, 4, -1, -1)
    for weights in attentions:
        assert (weights[~inside] == 0).all()
        assert (weights[inside] > 0).all()
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 4, 16))


def test_documents_with_padding(model: GPTJForCausalLM, ids: Tensor) -> None:
    real = torch.ones_like(ids)
    real[:, 14:] = 0
    packed = model(ids, document_ids=DOCUMENTS).logits
    padded = model(ids, document_ids=DOCUMENTS, attention_mask=real).logits
    torch.testing.assert_close(padded[:, :14], packed[:, :14], atol=1e-5, rtol=1e-5)


def test_one_document_a_row_is_plain_attention(model: GPTJForCausalLM, ids: Tensor) -> None:
    assert torch.equal(model(ids, document_ids=torch.full_like(ids, 7)).logits, model(ids).logits)


def test_document_lengths_starts_and_positions() -> None:
    documents = torch.tensor([[5, 5, 5, 2, 2, 5], [5, 5, 0, 1, 2, 2]])
    assert document_lengths(documents) == (3, 2, 1, 2, 1, 1, 2)
    assert document_starts(documents).int().tolist() == [[1, 0, 0, 1, 0, 1], [1, 0, 1, 1, 1, 0]]
    assert positions_in_documents(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 1]]
    one = torch.zeros(2, 4, dtype=torch.long)  # the same id in two rows is two documents
    assert document_lengths(one) == (4, 4)
    assert positions_in_documents(one).tolist() == [[0, 1, 2, 3]] * 2
    assert document_lengths(torch.tensor([[1]])) == (1,)


def test_pattern_is_the_cheapest_that_says_it() -> None:
    hidden, documents = torch.zeros(3, 16, 8), DOCUMENTS
    whole = torch.ones(3, 16)

    def pattern(**changes: object) -> tuple[bool, bool]:
        arguments = {"past_length": 0, "attention_mask": None, "document_ids": None, "eager": False} | changes
        found = attention_pattern(hidden, **arguments)
        return found.mask is not None, found.lengths is not None

    assert pattern() == (False, False)
    assert pattern(attention_mask=whole) == (False, False)
    assert pattern(document_ids=torch.zeros_like(documents)) == (False, False)
    assert pattern(document_ids=documents) == (False, True)
    assert pattern(document_ids=documents, attention_mask=whole) == (False, True)
    assert pattern(document_ids=documents, eager=True) == (True, False)
    assert pattern(attention_mask=whole.tril()) == (True, False)
    assert pattern(past_length=4) == (True, False)
