"""The chunked loss equals cross_entropy on all logits, in value and gradient, and never stores all logits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.model import loss as loss_module
from gptj_train.model.loss import IGNORE, linear_cross_entropy, next_token_targets

TOKENS, SIZE, VOCAB = 50, 16, 37
NAMES = ("hidden", "weight", "bias")


def operands(dtype: torch.dtype = torch.float32, bias: bool = True) -> dict[str, Tensor | None]:
    return {
        "hidden": torch.randn(TOKENS, SIZE, dtype=dtype).requires_grad_(),
        "weight": torch.randn(VOCAB, SIZE, dtype=dtype).requires_grad_(),
        "bias": torch.randn(VOCAB, dtype=dtype).requires_grad_() if bias else None,
    }


def random_targets(ignored: float = 0.3) -> Tensor:
    targets = torch.randint(VOCAB, (TOKENS,))
    return targets.masked_fill(torch.rand(TOKENS) < ignored, IGNORE)


def chunked_loss(given: dict[str, Tensor | None], targets: Tensor) -> Tensor:
    return linear_cross_entropy(given["hidden"], given["weight"], given["bias"], targets)


def reference_loss(given: dict[str, Tensor | None], targets: Tensor) -> Tensor:
    """Sum the losses in fp64, on all logits at once."""
    hidden, weight, bias = (None if given[name] is None else given[name].double() for name in NAMES)
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, ignore_index=IGNORE, reduction="sum")


def value_and_gradients(compute: Any, given: dict[str, Tensor | None], targets: Tensor, scale: float) -> list[Tensor]:
    copies = {name: None if x is None else x.detach().clone().requires_grad_() for name, x in given.items()}
    value = compute(copies, targets)
    (value * scale).backward()
    return [value.detach(), *(x.grad for x in copies.values() if x is not None)]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("chunk", [1, 7, 50, 512])
def test_value_and_gradients(
    monkeypatch: pytest.MonkeyPatch, chunk: int, ignored: float, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    given, targets = operands(dtype, bias), random_targets(ignored)
    targets[3] = VOCAB - 1
    for scale in (1.0, -0.25):
        ours = value_and_gradients(chunked_loss, given, targets, scale)
        theirs = value_and_gradients(reference_loss, given, targets, scale)
        assert ours[0].dtype == torch.float32
        for mine, other in zip(ours, theirs, strict=True):
            assert relative_error(mine, other) < tolerance
        for gradient in ours[1:]:
            assert gradient.dtype == dtype


def test_bf16_gradients_are_as_accurate_in_many_chunks_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Sums over chunks are kept in fp32, so many chunks cost no accuracy.
    given, targets = operands(torch.bfloat16), random_targets()
    exact = value_and_gradients(reference_loss, given, targets, 1.0)
    gaps = []
    for chunk in (1, 512):
        monkeypatch.setattr(loss_module, "CHUNK", chunk)
        ours = value_and_gradients(chunked_loss, given, targets, 1.0)
        gaps.append([relative_error(mine, other) for mine, other in zip(ours, exact, strict=True)])
    for many, one in zip(*gaps, strict=True):
        assert many < 1.5 * one + 1e-3


def test_extreme_logits_stay_finite() -> None:
    given, targets = operands(), random_targets()
    given["hidden"].data *= 1e4
    ours, theirs = (value_and_gradients(compute, given, targets, 1.0) for compute in (chunked_loss, reference_loss))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.isfinite().all()
        assert relative_error(mine, other) < 1e-5


def test_ignored_tokens_get_no_gradient() -> None:
    given, targets = operands(), random_targets()
    chunked_loss(given, targets).backward()
    gradient = given["hidden"].grad
    assert (gradient[targets == IGNORE] == 0).all()
    assert (gradient[targets != IGNORE] != 0).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_targets_give_exactly_zero(dtype: torch.dtype) -> None:
    given = operands(dtype)
    value = chunked_loss(given, torch.full((TOKENS,), IGNORE))
    assert value.dtype == torch.float32
    assert value.item() == 0
    value.backward()
    for name in NAMES:
        assert torch.equal(given[name].grad, torch.zeros_like(given[name])), name


@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("bias",), ("weight", "bias"), ("hidden", "weight")])
def test_frozen_operands_get_no_gradient(frozen: tuple[str, ...]) -> None:
    given, reference, targets = operands(), operands(), random_targets()
    for name in NAMES:
        reference[name].data.copy_(given[name].data)
    for name in frozen:
        given[name].requires_grad_(False)
    chunked_loss(given, targets).backward()
    reference_loss(reference, targets).backward()
    for name in NAMES:
        if name in frozen:
            assert given[name].grad is None
        else:
            assert relative_error(given[name].grad, reference[name].grad) < 1e-6


def test_without_gradients() -> None:
    given, targets = operands(), random_targets()
    expected = chunked_loss(given, targets)
    with torch.no_grad():
        value = chunked_loss(given, targets)
    assert torch.equal(value, expected)
    assert not value.requires_grad
    with torch.inference_mode():
        assert torch.equal(chunked_loss(given, targets), expected)


def test_gradients_accumulate_over_calls() -> None:
    given, first, second = operands(), random_targets(), random_targets()
    for targets in (first, second):
        chunked_loss(given, targets).backward()
    summed = {name: given[name].grad for name in NAMES}
    for name in NAMES:
        given[name].grad = None
    (reference_loss(given, first) + reference_loss(given, second)).backward()
    for name in NAMES:
        assert relative_error(summed[name], given[name].grad) < 1e-6


class LargestTensor(TorchDispatchMode):
    """Records the largest element count, fp32 and of any dtype, that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = {"any": 0, "float32": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.numel["any"] = max(self.numel["any"], leaf.numel())
                if leaf.dtype == torch.float32:
                    self.numel["float32"] = max(self.numel["float32"], leaf.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    chunk, tokens, size, vocab = 8, 400, 8, 300
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    hidden = torch.randn(tokens, size, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, size, dtype=dtype).requires_grad_()
    bias = torch.zeros(vocab, dtype=dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,))
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, bias, targets).backward()
    assert chunk * vocab <= largest.numel["any"] <= max(chunk * vocab, tokens * size, vocab * size)

    with LargestTensor() as control:  # The instrument detects logits where they exist.
        F.cross_entropy(F.linear(hidden, weight, bias).float(), targets).backward()
    assert control.numel["float32"] == tokens * vocab


class CountedOperations(TorchDispatchMode):
    """Counts the elements that each operation returns, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements[func.overloadpacket.__name__] += leaf.numel()
        return result


@pytest.mark.parametrize(("chunk", "chunks"), [(TOKENS, 1), (25, 2)])
def test_one_exp_and_no_sum_for_the_first_chunk(monkeypatch: pytest.MonkeyPatch, chunk: int, chunks: int) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    given = operands(torch.bfloat16, bias=False)
    with CountedOperations() as counted:
        chunked_loss(given, random_targets(ignored=0))
    assert counted.elements["exp_"] == TOKENS * VOCAB
    assert counted.elements["exp"] == 0
    # Only the chunks after the first add to the weight's gradient, and only they need it in fp32.
    assert counted.elements["add_"] == chunks + (chunks - 1) * VOCAB * SIZE
    assert counted.elements["_to_copy"] == TOKENS * VOCAB * 2 + (chunks - 1) * VOCAB * SIZE


@pytest.mark.parametrize("arguments", [{"num_items_in_batch": 46.0}, {"skip_logits": True}], ids=["counted", "skipped"])
@pytest.mark.parametrize("train", [True, False])
def test_a_models_loss_never_stores_all_logits(
    monkeypatch: pytest.MonkeyPatch, train: bool, arguments: dict[str, Any]
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", 4)
    vocab, tokens = 1000, 2 * 24
    config = GPTJConfig(vocab_size=vocab, n_positions=24, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_inner=16)
    model = GPTJForCausalLM(config).train(train)
    ids = torch.randint(vocab, (2, 24))
    with torch.set_grad_enabled(train), LargestTensor() as largest:
        loss = model(ids, labels=ids, **arguments).loss
        if train:
            loss.backward()
    assert largest.numel["any"] <= vocab * config.n_embd < tokens * vocab
    with LargestTensor() as control:
        model(ids, labels=ids)
    assert control.numel["any"] == tokens * vocab


def test_next_token_targets() -> None:
    labels = torch.tensor([[5, 6, IGNORE, 8], [1, 2, 3, 4]])
    assert next_token_targets(labels).tolist() == [[6, IGNORE, 8, IGNORE], [2, 3, 4, IGNORE]]
    documents = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 2]])
    assert next_token_targets(labels, documents).tolist() == [[6, IGNORE, 8, IGNORE], [IGNORE, IGNORE, 4, IGNORE]]
    assert labels.tolist() == [[5, 6, IGNORE, 8], [1, 2, 3, 4]]


@pytest.mark.parametrize("documents", [None, torch.tensor([[3]])])
def test_one_token_has_no_target(documents: Tensor | None) -> None:
    assert next_token_targets(torch.tensor([[7]]), documents).tolist() == [[IGNORE]]
