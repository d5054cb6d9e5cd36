"""Task heads on the GPT-J trunk."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gptj_train.model.attention import KVCache
from gptj_train.model.config import GPTJConfig
from gptj_train.model.generation import GenerationMixin
from gptj_train.model.gptj import GPTJModel
from gptj_train.model.layers import Linear
from gptj_train.model.loss import IGNORE, linear_cross_entropy, next_token_targets
from gptj_train.model.outputs import CausalLMOutput, Deferred


class LMHead(Linear):
    """D -> V logits, or their summed loss at given targets without storing the logits.

    Both go through this module's own forward, because ZeRO-3 gathers a module's weights only there.
    """

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, V); with targets (B, T) -> scalar fp32 sum of their losses."""
        if targets is None:
            return super().forward(hidden)
        return linear_cross_entropy(hidden.flatten(0, -2), self.weight, self.bias, targets.flatten())


class GPTJForCausalLM(GenerationMixin, nn.Module):
    """GPT-J with its language-model head. Numbers and parameter names equal ``transformers.GPTJForCausalLM``."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = GPTJModel(config)
        self.lm_head = LMHead(config.n_embd, config.vocab_size, config.initializer_range)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def gradient_checkpointing_enable(self) -> None:
        """Recompute each block in the backward instead of keeping its activations (training only)."""
        self.transformer.gradient_checkpointing = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        document_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Logits, and with labels the next-token loss. Arguments not named here: see ``GPTJModel.forward``.

        Args:
            labels: (B, T) token ids, IGNORE (-100) where none is to be predicted; shifted inside, so
                ``labels=input_ids`` trains on every token.
            logits_to_keep: compute only the last this many positions' logits; 0 means all.
            num_items_in_batch: divide the summed loss by this instead of by the batch's own targets.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        base = self.transformer(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cache_position=cache_position,
            document_ids=document_ids,
        )
        hidden = base.last_hidden_state
        kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        loss = None
        logits: Tensor | Deferred
        if labels is None:
            logits = self.lm_head(kept)
        else:
            targets = next_token_targets(labels, document_ids)
            count = (targets != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
            loss = self.lm_head(hidden, targets) / count
            logits = Deferred(lambda: self.lm_head(kept))
        output = CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=base.past_key_values,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
        )
        return output if return_dict else output.to_tuple()
