"""GPT-J's trunk: parallel attention and MLP on one LayerNorm, summed into the residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gptj_train.errors import UserError
from gptj_train.model.activations import ACTIVATIONS
from gptj_train.model.attention import (
    AttentionPattern,
    GPTJAttention,
    KVCache,
    attention_pattern,
    positions_in_documents,
)
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.layers import Embedding, Linear
from gptj_train.model.outputs import BaseModelOutput
from gptj_train.model.pretrained import PreTrained
from gptj_train.model.rotary import rotary_angles


class GPTJMLP(nn.Module):
    """D -> F -> D with the config's activation."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.fc_in = Linear(config.n_embd, config.inner_size, config.initializer_range)
        self.fc_out = Linear(config.inner_size, config.n_embd, config.initializer_range)
        self.activation = ACTIVATIONS[config.activation_function]
        self.resid_pdrop = config.resid_pdrop

    def forward(self, hidden: Tensor) -> Tensor:
        return F.dropout(self.fc_out(self.activation(self.fc_in(hidden))), self.resid_pdrop, self.training)


class GPTJBlock(nn.Module):
    """One layer: x + attention(ln_1(x)) + mlp(ln_1(x))."""

    def __init__(self, config: GPTJConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPTJAttention(config, layer)
        self.mlp = GPTJMLP(config)

    def forward(
        self,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        pattern: AttentionPattern,
        cache: KVCache | None = None,
        head_mask: Tensor | None = None,
        explicit: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        normed = self.ln_1(hidden)
        attended, weights = self.attn(normed, angles, pattern, cache, head_mask, explicit)
        return attended + self.mlp(normed) + hidden, weights


class GPTJModel(PreTrained):
    """The transformer without a head. Numbers and parameter names equal ``transformers.GPTJModel``."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.wte = Embedding(config.vocab_size, config.n_embd, config.initializer_range)
        self.h = nn.ModuleList(GPTJBlock(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Hidden states of a batch.

        Args:
            input_ids: (B, T) token ids; or ``inputs_embeds`` (B, T, D), exactly one of the two.
            past_key_values: the cache a previous call returned.
            attention_mask: (B, past + T), nonzero for real tokens; or a finished 4-D mask.
            token_type_ids: (B, T) ids whose embeddings are added to the tokens'.
            position_ids: (B, T) or (1, T); by default from ``cache_position``, the documents, or the cache
                length. Positions that jump isolate documents as in Transformers: without mask and cache.
            head_mask: (N) or (n_layer, N), multiplies attention weights; takes the explicit, slower path.
            output_attentions: also return attention weights; takes the explicit, slower path.
            cache_position: (T) positions of the new tokens.
            document_ids: (B, T); tokens attend only within their run of equal ids, positions restart in it.

        Raises:
            UserError: both or neither of the inputs, positions beyond ``n_positions``, sizes that do not fit.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give exactly one of input_ids and inputs_embeds")
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        use_cache = config.use_cache if use_cache is None else use_cache
        checkpointing = self.gradient_checkpointing and self.training
        use_cache = use_cache and not checkpointing and document_ids is None
        cache = KVCache() if use_cache and past_key_values is None else past_key_values

        hidden = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is not None:
            hidden = hidden + self.wte(token_type_ids.view(hidden.shape[:2]))
        hidden = F.dropout(hidden, config.embd_pdrop, self.training)

        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = self._default_positions(hidden, past, cache_position, document_ids)
        elif document_ids is None and attention_mask is None and cache is None:
            document_ids = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(1)
            document_ids = document_ids.expand(hidden.shape[:2])
        self._check_positions(position_ids)
        angles = rotary_angles(position_ids, config.n_positions, config.rotary_size)
        explicit = output_attentions or head_mask is not None
        pattern = attention_pattern(hidden, past, attention_mask, document_ids, explicit)
        explicit = explicit or (torch.is_grad_enabled() and pattern.has_blind_rows())

        all_hidden: tuple[Tensor, ...] = ()
        all_weights: tuple[Tensor | None, ...] = ()
        for layer, block in enumerate(self.h):
            all_hidden += (hidden,) if output_hidden_states else ()
            mask = _layer_head_mask(head_mask, layer)
            arguments = (hidden, angles, pattern, cache, mask, explicit)
            hidden, weights = checkpoint(block, *arguments, use_reentrant=False) if checkpointing else block(*arguments)
            all_weights += (weights,) if output_attentions else ()
        hidden = self.ln_f(hidden)
        all_hidden += (hidden,) if output_hidden_states else ()
        output = BaseModelOutput(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=all_hidden or None,
            attentions=all_weights or None,
        )
        return output if return_dict else output.to_tuple()

    @staticmethod
    def _default_positions(
        hidden: Tensor, past: int, cache_position: Tensor | None, document_ids: Tensor | None
    ) -> Tensor:
        if document_ids is not None:
            return positions_in_documents(document_ids)
        if cache_position is not None:
            return cache_position.view(1, -1)
        return torch.arange(past, past + hidden.shape[1], device=hidden.device).unsqueeze(0)

    def _check_positions(self, position_ids: Tensor) -> None:
        # On an accelerator the indexing itself asserts; reading the maximum would stall it.
        length = position_ids.shape[1]
        beyond = length > self.config.n_positions
        if beyond or (not position_ids.is_cuda and int(position_ids.max()) >= self.config.n_positions):
            raise UserError(f"the sequence is longer than the model's n_positions ({self.config.n_positions})")


def _layer_head_mask(head_mask: Tensor | None, layer: int) -> Tensor | None:
    if head_mask is None:
        return None
    mask = head_mask[layer] if head_mask.dim() > 1 else head_mask
    return mask.view(1, -1, 1, 1) if mask.dim() == 1 else mask
