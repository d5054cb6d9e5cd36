"""What a forward returns: values by name, by key or by index, as Transformers' ModelOutput."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from gptj_train.model.kv_cache import KVCache


class ModelOutput:
    """Values in the order of the class's annotations; a value of None counts as absent.

    ``out.loss``, ``out["loss"]``, ``out[0]``, ``"loss" in out``, ``out.keys()`` and ``out.to_tuple()`` all work.
    An absent value is None as an attribute and a KeyError as a key.
    """

    def __init__(self, **values: Any) -> None:
        names = self.__class__.__annotations__
        assert values.keys() <= names.keys()
        self._values: dict[str, Any] = {}
        # In annotated order, not in the caller's: the order decides what out[0] is.
        for name in names:
            value = values.get(name)
            if value is not None:
                self._values[name] = value

    def __getattr__(self, name: str) -> Any:
        if name not in self.__class__.__annotations__:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return self._values.get(name)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return self._values[key]
        return self.to_tuple()[key]

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def keys(self) -> list[str]:
        """Return the names of the values that are present."""
        return list(self._values)

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are present."""
        return tuple(self._values.values())


class BaseModelOutput(ModelOutput):
    """What ``GPTJModel`` returns.

    Attributes:
        last_hidden_state: (B, T, D) after the final LayerNorm.
        hidden_states: n_layer + 1 tensors (B, T, D): the blocks' inputs, then ``last_hidden_state``.
        attentions: n_layer tensors (B, N, T, S).
    """

    last_hidden_state: Tensor
    past_key_values: KVCache | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class CausalLMOutput(ModelOutput):
    """What ``GPTJForCausalLM`` returns.

    Attributes:
        loss: scalar fp32; absent without labels.
        logits: (B, T, V) in the model's dtype; absent if the forward skipped them.
    """

    loss: Tensor | None
    logits: Tensor | None
    past_key_values: KVCache | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class SequenceClassifierOutput(ModelOutput):
    """What ``GPTJForSequenceClassification`` returns.

    Attributes:
        loss: scalar fp32; absent without labels.
        logits: (B, num_labels) in the model's dtype, at each row's last real token.
    """

    loss: Tensor | None
    logits: Tensor
    past_key_values: KVCache | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class QuestionAnsweringOutput(ModelOutput):
    """What ``GPTJForQuestionAnswering`` returns.

    Attributes:
        loss: scalar fp32; absent without answer positions.
        start_logits, end_logits: (B, T) in the model's dtype.
    """

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
