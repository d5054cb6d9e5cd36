"""Build a model of ours and Transformers' with the same config and weights, and compare their numbers."""

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
    """Build a Transformers model in eval mode, with weights so large that every part of it changes the output."""
    config = transformers.GPTJConfig(**(SMALL | changes))
    reference = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(mean=float(name.endswith(("ln_1.weight", "ln_f.weight"))), std=0.2)
    return reference


def build_pair(kind: str = "GPTJForCausalLM", **changes: Any) -> tuple[Any, Any]:
    """Return (ours, theirs), both in eval mode."""
    reference = build_reference(kind, **changes)
    model = getattr(gptj_train, kind)(gptj_train.GPTJConfig(**(SMALL | changes))).eval()
    model.load_state_dict(reference.state_dict())
    return model, reference


def random_ids(batch: int = 2, length: int = 11, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, (batch, length))


def padding_mask(lengths: list[int], side: str, width: int = 11) -> Tensor:
    """Return (B, width): 1 at each row's ``lengths`` real tokens, 0 at padding on the given side."""
    rows = []
    for length in lengths:
        real, pad = [1] * length, [0] * (width - length)
        rows.append(pad + real if side == "left" else real + pad)
    return torch.tensor(rows)


def positions_of(mask: Tensor) -> Tensor:
    """Return positions that count real tokens only, as generate passes them."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest value of the reference."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def assert_close(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> None:
    """Assert that tensors, or tuples of tensors, agree in shape, dtype and every value."""
    if isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_close(mine, other, tolerance)
    else:
        assert relative_error(ours, theirs) < tolerance  # False for NaN as well.


def assert_gradients_close(ours: nn.Module, theirs: nn.Module, tolerance: float = TOLERANCE) -> None:
    """Assert that both models have the same parameters and gradients."""
    found, expected = gradients(ours), gradients(theirs)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < tolerance, name


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter's gradient; all must have one."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]
