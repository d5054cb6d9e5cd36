"""What a forward returns: values by name, by key or as a tuple, as Transformers' ModelOutput."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gptj_train.model.attention import KVCache


class Deferred:
    """A tensor that is computed when first read, under the grad mode of its creation.

    It sees the weights of that moment: read it before they change, and under ZeRO-3 on every rank.
    """

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute, self._grad = compute, torch.is_grad_enabled()

    def __call__(self) -> Tensor:
        with torch.set_grad_enabled(self._grad):
            return self._compute()


class ModelOutput:
    """Values in the order of the class's annotations; a value of None counts as absent.

    ``out.loss``, ``out["loss"]``, ``out[0]``, ``"loss" in out``, ``out.keys()`` and ``out.to_tuple()`` all
    work. A value may be ``Deferred``: it is computed when first read.
    """

    def __init__(self, **values: Any) -> None:
        names = self.__class__.__annotations__
        assert values.keys() <= names.keys()
        self._values = {name: values[name] for name in names if values.get(name) is not None}

    def __getattr__(self, name: str) -> Any:
        if name not in self.__class__.__annotations__:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return self[name] if name in self._values else None

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        value = self._values[key]
        if isinstance(value, Deferred):
            value = self._values[key] = value()
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def keys(self) -> list[str]:
        return list(self._values)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self[key] for key in self._values)


class BaseModelOutput(ModelOutput):
    """last_hidden_state (B, T, D) after the final norm; hidden_states: n_layer + 1 of (B, T, D);
    attentions: n_layer of (B, N, T, S)."""

    last_hidden_state: Tensor
    past_key_values: KVCache | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class SequenceClassifierOutput(ModelOutput):
    """loss: scalar fp32, absent without labels; logits (B, num_labels) at each row's last real token."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: KVCache | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class QuestionAnsweringOutput(ModelOutput):
    """loss: scalar fp32, absent without positions; start_logits and end_logits (B, T)."""

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class CausalLMOutput(ModelOutput):
    """loss: scalar fp32, absent without labels; logits (B, T, V) in the model's dtype, computed on
    first read when there are labels, for the loss does not need them."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: KVCache | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
