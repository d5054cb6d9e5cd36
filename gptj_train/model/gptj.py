"""GPT-J's trunk: attention and MLP in parallel on one LayerNorm, both added to the residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptj_train.errors import UserError
from gptj_train.model.activations import ACTIVATIONS
from gptj_train.model.attention import AttentionPattern, GPTJAttention, attention_pattern
from gptj_train.model.batch_facts import BatchFacts
from gptj_train.model.document_positions import documents_from_positions, positions_in_documents
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.kv_cache import KVCache, TrimmedCache, past_length_of
from gptj_train.model.layers import Embedding, Linear
from gptj_train.model.outputs import BaseModelOutput
from gptj_train.model.pretrained import PreTrained
from gptj_train.model.recomputation import Degree, has_dropout, recomputed
from gptj_train.model.rotary import rotary_angles


class GPTJMLP(nn.Module):
    """The feed-forward network D -> F -> D with the config's activation."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.fc_in = Linear(config.n_embd, config.inner_size, config.initializer_range)
        self.fc_out = Linear(config.inner_size, config.n_embd, config.initializer_range)
        self.activation = ACTIVATIONS[config.activation_function]
        self.resid_pdrop = config.resid_pdrop
        self.recomputes: Degree = "none"

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if not self.training or self.recomputes == "none":
            out = self._out_of_hidden(hidden)
        elif self.recomputes == "mlp":
            draws = has_dropout(self.fc_in) or has_dropout(self.fc_out)
            out = recomputed(self._out_of_hidden, hidden, draws=draws)
        else:
            out = recomputed(self._out_of_inner, self.fc_in(hidden), draws=has_dropout(self.fc_out))
        return F.dropout(out, self.resid_pdrop, self.training)

    def _out_of_hidden(self, hidden: Tensor) -> Tensor:
        return self._out_of_inner(self.fc_in(hidden))

    def _out_of_inner(self, inner: Tensor) -> Tensor:
        # Recomputation ends before the product: its result is no input of a gradient.
        out: Tensor = self.fc_out(self.activation(inner))
        return out


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
        cache: KVCache | TrimmedCache | None = None,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the next hidden states (B, T, D) and the attention weights; arguments of ``GPTJAttention``."""
        normed = self.ln_1(hidden)
        attended, weights = self.attn(normed, angles, pattern, cache, head_mask)
        # The order of the sum decides how it rounds; it is that of Transformers.
        return attended + self.mlp(normed) + hidden, weights


class GPTJModel(PreTrained):
    """The transformer without a head. Parameter names and numbers equal ``transformers.GPTJModel``."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.wte = Embedding(config.vocab_size, config.n_embd, config.initializer_range)
        self.h = nn.ModuleList(GPTJBlock(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,  # Transformers' order ends here: version 5 removed head_mask, the next one.
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        document_ids: Tensor | None = None,
        facts: BatchFacts | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Compute the hidden states of a batch. Arguments that are None take the config's value.

        Args:
            input_ids: (B, T) token ids. Give them or ``inputs_embeds``.
            past_key_values: the cache of a previous call, or another library's; see ``TrimmedCache``. The new tokens
                are appended to it.
            attention_mask: (B, past + T), nonzero for real tokens; or a complete 4-D mask.
            token_type_ids: (B, T) ids whose embeddings are added to the tokens'.
            position_ids: (B, T) or (1, T); by default from ``document_ids``, ``cache_position`` or the cache
                length. Positions that jump isolate documents as in Transformers: without mask and cache.
            head_mask: (N) or (n_layer, N) factors of the attention weights; uses eager attention, which is slower.
            inputs_embeds: (B, T, D) in place of ``input_ids``.
            use_cache: return a KVCache; not with ``document_ids`` nor while recomputing blocks.
            output_attentions: return the attention weights; uses eager attention, which is slower.
            output_hidden_states: return the inputs of all blocks.
            return_dict: return a ``BaseModelOutput``, else a tuple.
            cache_position: (T) positions of the new tokens.
            document_ids: (B, T); tokens attend only within their run of equal ids, positions restart in it.
            facts: of the batch, so that the forward reads nothing from the device.

        Raises:
            UserError: both or neither of the inputs, positions outside 0 to ``n_positions``, shapes that do not match.
        """
        config = self.config
        if use_cache is None:
            use_cache = config.use_cache
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states

        hidden = self._embed(input_ids, inputs_embeds, token_type_ids)
        cache = past_key_values
        # A recomputed block would append its keys a second time; documents are never continued.
        if cache is None and use_cache and not self._recomputes_blocks and document_ids is None:
            cache = KVCache()
        past_length = past_length_of(cache)
        total = past_length + hidden.shape[1]
        if position_ids is None:
            position_ids = _default_positions(hidden, past_length, cache_position, document_ids)
            highest = total - 1 if cache_position is None else None
        else:
            highest = None
            if document_ids is None and attention_mask is None and cache is None:
                document_ids = documents_from_positions(position_ids).expand(hidden.shape[:2])
        self._check_positions(position_ids, highest)

        # Angles and pattern are the same in every layer, so they are computed once.
        angles = rotary_angles(position_ids, config.n_positions, config.rotary_size)
        pattern = attention_pattern(
            hidden,
            past_length=past_length,
            attention_mask=attention_mask,
            document_ids=document_ids,
            eager=output_attentions or head_mask is not None,
            facts=facts,
        )
        hidden, all_hidden, all_weights = self._run_blocks(
            hidden,
            (angles, pattern, cache if isinstance(cache, KVCache | None) else TrimmedCache(cache, total)),
            head_mask=head_mask,
            keep_hidden=output_hidden_states,
            keep_weights=output_attentions,
        )
        output = BaseModelOutput(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=all_hidden or None,
            attentions=all_weights or None,
        )
        return self._as_requested(output, return_dict)

    def _run_blocks(
        self,
        hidden: Tensor,
        shared: tuple[tuple[Tensor, Tensor], AttentionPattern, KVCache | TrimmedCache | None],
        *,
        head_mask: Tensor | None,
        keep_hidden: bool,
        keep_weights: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Run all blocks and the final LayerNorm.

        Args:
            hidden: (B, T, D), the embeddings.
            shared: angles, pattern and cache, arguments of every block.

        Returns:
            The last hidden states (B, T, D), and what was asked to be kept: n_layer + 1 hidden states, n_layer
            attention weights, else nothing, so that their memory is freed layer by layer.
        """
        all_hidden: list[Tensor] = []
        all_weights: list[Tensor | None] = []
        # All blocks are alike, adapters included.
        draws = self._recomputes_blocks and has_dropout(self.h[0])
        for layer, block in enumerate(self.h):
            if keep_hidden:
                all_hidden.append(hidden)
            arguments = (hidden, *shared, _layer_head_mask(head_mask, layer, hidden.dtype))
            if self._recomputes_blocks:
                hidden, weights = recomputed(block, *arguments, draws=draws)
            else:
                hidden, weights = block(*arguments)
            if keep_weights:
                all_weights.append(weights)
        hidden = self.ln_f(hidden)
        if keep_hidden:
            all_hidden.append(hidden)
        return hidden, tuple(all_hidden), tuple(all_weights)

    @property
    def _recomputes_blocks(self) -> bool:
        return self.gradient_checkpointing and self.training

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, token_type_ids: Tensor | None) -> Tensor:
        """Return the input (B, T, D) of the first block."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give exactly one of input_ids and inputs_embeds")
        hidden = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is not None:
            hidden = hidden + self.wte(token_type_ids.view(hidden.shape[:2]))
        return F.dropout(hidden, self.config.embd_pdrop, self.training)

    def _check_positions(self, position_ids: Tensor, highest: int | None) -> None:
        """Refuse positions outside the table; ``highest`` is their largest if that is known without reading them."""
        limit = self.config.n_positions
        # On a GPU, and in a compiled graph, the lookup itself asserts; reading values would wait for the device.
        lowest = 0
        if highest is None and position_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            lowest, highest = (int(value) for value in position_ids.aminmax())
        if position_ids.shape[1] > limit or (highest is not None and highest >= limit):
            raise UserError(f"the sequence is longer than the model's n_positions ({limit})")
        if lowest < 0:
            raise UserError(f"position_ids must be at least 0, got {lowest}")


def _default_positions(
    hidden: Tensor,
    past_length: int,
    cache_position: Tensor | None,
    document_ids: Tensor | None,
) -> Tensor:
    """Return (B, T) or (1, T) positions: in the documents, else in the cache."""
    if document_ids is not None:
        return positions_in_documents(document_ids)
    if cache_position is not None:
        return cache_position.view(1, -1)
    end = past_length + hidden.shape[1]
    return torch.arange(past_length, end, device=hidden.device).unsqueeze(0)


def _layer_head_mask(head_mask: Tensor | None, layer: int, dtype: torch.dtype) -> Tensor | None:
    """Return a layer's head mask, (N) as (1, N, 1, 1)."""
    if head_mask is None:
        return None
    mask = head_mask[layer] if head_mask.dim() > 1 else head_mask
    if mask.dim() == 1:
        mask = mask.view(1, -1, 1, 1)
    # An fp32 mask would promote bf16 weights, and their product with bf16 values would fail.
    return mask.to(dtype)
