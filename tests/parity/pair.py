"""A model of ours beside its Transformers twin: the same config, the same random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import gptj_train

transformers.utils.logging.disable_progress_bar()

TOLERANCE = 2e-5
VOCAB = 101

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "rotary_dim": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}


def build_reference(kind: str = "GPTJForCausalLM", **changes: Any) -> nn.Module:
    """A Transformers model in eval mode, its weights large enough that every part of it shows in the output."""
    config = transformers.GPTJConfig(**(SMALL | changes))
    reference = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(mean=float(name.endswith(("ln_1.weight", "ln_f.weight"))), std=0.2)
    return reference


def build_pair(kind: str = "GPTJForCausalLM", **changes: Any) -> tuple[Any, Any]:
    """(ours, theirs), both in eval mode."""
    reference = build_reference(kind, **changes)
    model = getattr(gptj_train, kind)(gptj_train.GPTJConfig(**(SMALL | changes))).eval()
    model.load_state_dict(reference.state_dict())
    return model, reference


def random_ids(batch: int = 2, length: int = 11, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, (batch, length))


def padding_mask(lengths: list[int], side: str, width: int = 11) -> Tensor:
    """(B, width) with 1 at ``lengths`` real tokens and 0 at padding on the given side."""
    rows = []
    for length in lengths:
        real, pad = [1] * length, [0] * (width - length)
        rows.append(pad + real if side == "left" else real + pad)
    return torch.tensor(rows)


def positions_of(mask: Tensor) -> Tensor:
    """Positions that count real tokens only, as generate gives them."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value of the reference."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def assert_close(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> None:
    """Tensors, or tuples of tensors, that agree everywhere."""
    if isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_close(mine, other, tolerance)
    else:
        assert gap(ours, theirs) < tolerance  # false for NaN as well


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]
