"""Task heads on the GPT-J trunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gptj_train.errors import UserError
from gptj_train.model.attention import KVCache
from gptj_train.model.generation import GenerationMixin
from gptj_train.model.gptj import GPTJModel
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.layers import Linear
from gptj_train.model.loss import IGNORE, linear_cross_entropy, next_token_targets
from gptj_train.model.outputs import CausalLMOutput, Deferred, QuestionAnsweringOutput, SequenceClassifierOutput
from gptj_train.model.pretrained import PreTrained


class LMHead(Linear):
    """D -> V logits, or their summed loss at given targets without storing the logits.

    Both go through this module's own forward, because ZeRO-3 gathers a module's weights only there.
    """

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, V); with targets (B, T) -> scalar fp32 sum of their losses."""
        if targets is None:
            return super().forward(hidden)
        return linear_cross_entropy(hidden.flatten(0, -2), self.weight, self.bias, targets.flatten())


class GPTJWithHead(PreTrained):
    """The trunk as ``transformer``; subclasses add a head."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.transformer = GPTJModel(config)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute each block in the backward instead of keeping its activations (training only)."""
        self.transformer.gradient_checkpointing = True


class GPTJForCausalLM(GenerationMixin, GPTJWithHead):
    """GPT-J with its language-model head. Numbers and parameter names equal ``transformers.GPTJForCausalLM``."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.lm_head = LMHead(config.n_embd, config.vocab_size, config.initializer_range)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make ``lm_head`` and the embedding one parameter if ``tie_word_embeddings`` is set."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

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


class GPTJForSequenceClassification(GPTJWithHead):
    """GPT-J with a label head on each row's last real token, as ``transformers.GPTJForSequenceClassification``."""

    new_head_allowed = True

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.score = Linear(config.n_embd, config.num_labels, config.initializer_range, bias=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Label logits, and with labels their loss. Other arguments: see ``GPTJModel.forward``.

        Args:
            labels: (B) class ids, (B, num_labels) floats of 0 and 1, or (B) or (B, num_labels) floats to
                regress on; ``config.problem_type`` says which, else it is taken from their type and
                ``num_labels`` and kept there. IGNORE rows of class ids are no targets.
            loss_weights: like ``labels``; factors of their losses, by default 1. The mean stays one over targets.
            num_items_in_batch: divide the summed loss by this instead of taking its mean.

        Raises:
            UserError: several rows, and neither a mask nor a pad id to find their ends by.
        """
        base = self.transformer(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **inputs
        )
        hidden = base.last_hidden_state
        last = self._last_tokens(input_ids, attention_mask, hidden)
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        loss = None if labels is None else self._loss(logits, labels, loss_weights, num_items_in_batch)
        output = SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            past_key_values=base.past_key_values,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _last_tokens(self, input_ids: Tensor | None, attention_mask: Tensor | None, hidden: Tensor) -> Tensor:
        """(B) position of each row's last real token: by mask, else by pad id, else the last one."""
        rows, length = hidden.shape[:2]
        pad = self.config.pad_token_id
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask[:, -length:] != 0
        elif pad is not None and input_ids is not None:
            real = input_ids != pad
        elif rows == 1 or input_ids is None:
            real = torch.ones(rows, length, dtype=torch.bool, device=hidden.device)
        else:
            raise UserError(
                "cannot tell where the rows of the batch end: give attention_mask, or set config.pad_token_id"
            )
        return (real * torch.arange(length, device=hidden.device)).argmax(dim=-1)

    def _loss(self, logits: Tensor, labels: Tensor, weights: Tensor | None, items: int | Tensor | None) -> Tensor:
        config = self.config
        if config.problem_type is None:
            integers = not labels.is_floating_point()
            multiple = "single_label_classification" if integers else "multi_label_classification"
            config.problem_type = "regression" if config.num_labels == 1 else multiple
        if config.problem_type == "single_label_classification":
            losses = F.cross_entropy(logits.float(), labels.flatten(), ignore_index=IGNORE, reduction="none")
            targets: int | Tensor = (labels != IGNORE).sum()
        else:
            regression = config.problem_type == "regression"
            loss = F.mse_loss if regression else F.binary_cross_entropy_with_logits
            losses = loss(logits.float(), labels.float().view_as(logits), reduction="none")
            targets = losses.numel()
        if weights is not None:
            losses = losses * weights.view_as(losses)
        return losses.sum() / (targets if items is None else items)


class GPTJForQuestionAnswering(GPTJWithHead):
    """GPT-J with a span head on every token, as ``transformers.GPTJForQuestionAnswering``."""

    new_head_allowed = True

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.qa_outputs = Linear(config.n_embd, 2, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **inputs: Any,
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
        """Logits of answer starts and ends, and with both positions the mean of their losses.

        Args:
            start_positions, end_positions: (B) token positions of the answer; below 0 counts as 0, and T or
                beyond as no target, as in Transformers.
            num_items_in_batch: divide the summed loss by this instead of taking its mean.
        """
        base = self.transformer(input_ids, return_dict=True, **(inputs | {"use_cache": False}))
        start_logits, end_logits = self.qa_outputs(base.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            beyond = start_logits.shape[1]
            reduction = "mean" if num_items_in_batch is None else "sum"
            start_loss, end_loss = (
                F.cross_entropy(
                    logits.float(), where.flatten().clamp(0, beyond), ignore_index=beyond, reduction=reduction
                )
                for logits, where in ((start_logits, start_positions), (end_logits, end_positions))
            )
            loss = (start_loss + end_loss) / 2
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        output = QuestionAnsweringOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()
