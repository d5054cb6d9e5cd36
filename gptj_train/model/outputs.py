"""What a forward returns: values by name, by key or by index, as Transformers' ModelOutput."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.utils import _pytree as pytree


class ModelOutput(OrderedDict[str, Any]):
    """A dictionary of values in the order of the class's annotations; a value of None counts as absent.

    ``out.loss``, ``out["loss"]``, ``out[0]``, ``out.get("loss")``, ``out.items()`` and ``out.to_tuple()`` all work,
    and so does assignment by name or key. An absent value is None as an attribute and a KeyError as a key.

    An ordered dictionary, because wrappers look for the tensors of an output by its type: DistributedDataParallel
    and accelerate search dictionaries, FSDP rebuilds an OrderedDict, torch.export and FSDP2 ask the pytree registry.

    Args:
        values: names and values; the arguments by keyword are added to them.
    """

    names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls.names = tuple(cls.__annotations__)
        # Without this, static_graph and FSDP2 would take an output for a leaf without tensors, and lose gradients.
        pytree.register_pytree_node(
            cls,
            _flatten,
            lambda values, names: cls(zip(names, values, strict=True)),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), **named: Any) -> None:
        super().__init__()
        given = dict(values, **named)
        # In annotated order, not in the caller's: the order decides what out[0] is.
        for name in self.names:
            value = given.pop(name, None)
            if value is not None:
                super().__setitem__(name, value)
        if given:
            raise KeyError(f"{type(self).__name__} has no {', '.join(given)}")

    def __getattr__(self, name: str) -> Any:
        if name not in self.names:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        return self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.names:
            raise KeyError(f"{type(self).__name__} has no {key!r}")
        if value is None:
            self.pop(key, None)
            return
        was_present = key in self
        super().__setitem__(key, value)
        if was_present:
            # It keeps its place. DeepSpeed's hooks assign to the keys while they iterate over them.
            return
        # A value that was absent is now the last one; those behind it in the annotated order move behind it.
        for name in self.names[self.names.index(key) + 1 :]:
            if name in self:
                self.move_to_end(name)

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are present."""
        return tuple(self.values())


def _flatten(output: ModelOutput) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output.keys())


class BaseModelOutput(ModelOutput):
    """What ``GPTJModel`` returns.

    Attributes:
        last_hidden_state: (B, T, D) after the final LayerNorm.
        hidden_states: n_layer + 1 tensors (B, T, D): the blocks' inputs, then ``last_hidden_state``.
        attentions: n_layer tensors (B, N, T, S).
    """

    last_hidden_state: Tensor
    past_key_values: Any
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
    past_key_values: Any
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
    past_key_values: Any
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


class GenerateOutput(ModelOutput):
    """What ``generate`` returns with ``return_dict_in_generate=True``.

    Attributes:
        sequences: (B, T + new) ids, or (B, new) after ``inputs_embeds``.
        sequences_scores: (B) of beam search: log-probabilities divided by length ** length_penalty.
        scores: of each new token (B, V) fp32, after all penalties and filters; absent without ``output_scores``.
        past_key_values: the cache, to continue the texts with.
    """

    sequences: Tensor
    sequences_scores: Tensor | None
    scores: tuple[Tensor, ...] | None
    past_key_values: Any
