"""Attributes and methods by which PEFT, pipelines, lm-eval and HF Trainer ask a model what it is."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gptj_train.errors import UserError
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.layers import Embedding, Linear


class TransformersNames(nn.Module):
    """What code written for ``transformers.PreTrainedModel`` reads; names and meanings are those of Transformers.

    Attributes:
        name_or_path: the folder that the model was read from.
        accepts_loss_kwargs: HF Trainer then passes ``num_items_in_batch``, by which all heads divide their loss.
        loss_type: name of the loss in Transformers' table of losses.
    """

    config: GPTJConfig
    name_or_path: str
    base_model_prefix: ClassVar[str] = "transformer"
    main_input_name: ClassVar[str] = "input_ids"
    accepts_loss_kwargs: ClassVar[bool] = False
    loss_type: ClassVar[str | None] = None
    input_modalities: ClassVar[tuple[str, ...]] = ("text",)
    output_modalities: ClassVar[tuple[str, ...]] = ("text",)
    supports_gradient_checkpointing: ClassVar[bool] = True

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first parameter."""
        return next(self.parameters()).dtype

    @property
    def base_model(self) -> nn.Module:
        """The trunk, which is the model itself without a head."""
        trunk: nn.Module = getattr(self, self.base_model_prefix, self)
        return trunk

    @classmethod
    def can_generate(cls) -> bool:
        """Return whether the class has ``generate``."""
        return hasattr(cls, "generate")

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of elements of all parameters; shared ones count once."""
        embedding = self.get_input_embeddings().weight
        total = 0
        for parameter in self.parameters():
            counted = parameter.requires_grad or not only_trainable
            if counted and not (exclude_embeddings and parameter is embedding):
                total += parameter.numel()
        return total

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of all parameters, and of all buffers."""
        held: list[Tensor] = list(self.parameters())
        if return_buffers:
            held.extend(self.buffers())
        return sum(tensor.nbytes for tensor in held)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding."""
        embedding = self.base_model.wte
        assert isinstance(embedding, nn.Embedding)
        return embedding

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.base_model.wte = embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the language-model head; None for a model without one."""
        head: nn.Module | None = getattr(self, "lm_head", None)
        return head

    def set_output_embeddings(self, head: nn.Module) -> None:
        """Replace the language-model head."""
        if self.get_output_embeddings() is None:
            raise UserError(f"{type(self).__name__} has no output embeddings to replace")
        self.lm_head = head

    def tie_weights(self, **_: Any) -> None:
        """Share parameters as the config asks for; a model without language-model head has none to share."""

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether the backward recomputes each block."""
        return bool(self.base_model.gradient_checkpointing)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute each block in the backward instead of keeping its activations (training mode only).

        Args:
            activation_checkpointing_kwargs: Transformers' arguments of torch's checkpoint; ``use_reentrant`` is False
                whatever it says, with the same gradients.
            every_n_layers, offload: not offered beyond their defaults.

        Raises:
            UserError: an argument that is not offered.
        """
        refused = set(activation_checkpointing_kwargs or {}) - {"use_reentrant"}
        if every_n_layers != 1:
            refused.add("every_n_layers")
        if offload:
            refused.add("offload")
        if refused:
            raise UserError(f"activation checkpointing does not offer {', '.join(sorted(refused))}")
        self.base_model.gradient_checkpointing = True  # type: ignore[assignment]

    def activation_checkpointing_disable(self) -> None:
        """Keep the activations of all blocks again."""
        self.base_model.gradient_checkpointing = False  # type: ignore[assignment]

    # The names before Transformers 6, which PEFT and our engine call.

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.is_activation_checkpointing

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **arguments: Any
    ) -> None:
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **arguments)

    def gradient_checkpointing_disable(self) -> None:
        self.activation_checkpointing_disable()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Change the number of rows of the token embedding and the language-model head.

        GPT-J itself seldom needs it: 143 of its 50400 rows belong to no token of its tokenizer. New rows are the mean
        of the old ones, so that a new token starts as likely as an average one. Make the optimizer afterwards.

        Args:
            new_num_tokens: rows to have; None keeps them.
            pad_to_multiple_of: raise the number to a multiple of this.

        Raises:
            UserError: no positive number of rows.
        """
        old = self.get_input_embeddings()
        rows = old.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            rows += -rows % pad_to_multiple_of
        if rows < 1:
            raise UserError(f"new_num_tokens must be at least 1, got {new_num_tokens}")
        if rows == old.num_embeddings:
            return old
        logging.getLogger(__name__).warning(
            "vocabulary resized from %d to %d rows; GPT-J's own tokenizer leaves rows 50257 to 50399 unused, which new "
            "tokens can take without resizing (add_tokens of the recipes)",
            *(old.num_embeddings, rows),
        )
        embedding = Embedding(rows, old.embedding_dim, self.config.initializer_range)
        embedding.weight = _resized(old.weight, rows)
        self.set_input_embeddings(embedding)
        head = self.get_output_embeddings()
        if isinstance(head, Linear):
            head.weight = _resized(head.weight, rows)
            if head.bias is not None:
                head.bias = _resized(head.bias, rows)
            head.out_features = rows
        self.config.vocab_size = rows
        self.tie_weights()
        return self.get_input_embeddings()


def _resized(old: Tensor, rows: int) -> nn.Parameter:
    """Return the first rows of a parameter (V, ...), and the mean of all where it has too few."""
    kept = old.detach()[:rows]
    # fp32: the mean of 50400 bf16 rows would drown in rounding.
    mean: Tensor = old.detach().float().mean(dim=0, keepdim=True).to(old.dtype)
    missing = mean.expand(rows - len(kept), *kept.shape[1:])
    return nn.Parameter(torch.cat((kept, missing)), requires_grad=old.requires_grad)
