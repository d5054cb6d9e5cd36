"""Task heads on the GPT-J trunk: language model, sequence classification, question answering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gptj_train.errors import UserError
from gptj_train.model.batch_facts import BatchFacts
from gptj_train.model.generation import GenerationMixin
from gptj_train.model.generation_config import GenerationConfig
from gptj_train.model.gptj import GPTJModel
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.layers import Linear
from gptj_train.model.lm_head import LMHead
from gptj_train.model.loss import IGNORE, next_token_targets
from gptj_train.model.outputs import CausalLMOutput, QuestionAnsweringOutput, SequenceClassifierOutput
from gptj_train.model.pretrained import PreTrained
from gptj_train.model.signatures import with_arguments_of


class GPTJWithHead(PreTrained):
    """The trunk as ``transformer``; each subclass adds a head.

    All heads have one shape: ``forward(input_ids, *, <the head's own arguments>, **inputs)``, where ``inputs`` are
    arguments of ``GPTJModel.forward``, which ``inspect.signature`` shows one by one. Only ``input_ids`` is
    positional, because Transformers' heads differ in what comes second.
    """

    accepts_loss_kwargs = True

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.transformer = GPTJModel(config)


class GPTJForCausalLM(GenerationMixin, GPTJWithHead):
    """GPT-J with a language-model head. Parameter names and numbers equal ``transformers.GPTJForCausalLM``."""

    loss_type = "ForCausalLM"
    tied_names = ("lm_head.weight", "transformer.wte.weight")

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.lm_head = LMHead(config.n_embd, config.vocab_size, config.initializer_range)
        self.tie_weights()
        self.generation_config = GenerationConfig()

    def tie_weights(self, **_: Any) -> None:
        """Make ``lm_head`` and the embedding one parameter if ``tie_word_embeddings`` is set."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    @with_arguments_of(GPTJModel.forward)
    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        num_items_in_batch: int | float | Tensor | None = None,
        logits_to_keep: int = 0,
        skip_logits: bool | None = None,
        return_dict: bool | None = None,
        facts: BatchFacts | None = None,
        **inputs: Any,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Compute logits, and with labels the next-token loss.

        Args:
            input_ids: (B, T) token ids.
            labels: (B, T) token ids, IGNORE (-100) at tokens not to predict. The model shifts them: with
                ``labels=input_ids`` it learns every token.
            document_ids: (B, T); see ``GPTJModel.forward``. No document's first token is a target.
            num_items_in_batch: divides the summed loss, in place of the batch's own number of targets.
            logits_to_keep: compute the logits of the last this many positions only; 0 means all.
            skip_logits: compute the loss alone. By default if ``num_items_in_batch`` is given with labels.
            **inputs: other arguments of ``GPTJModel.forward``.

        Raises:
            UserError: ``skip_logits`` without labels, and as ``GPTJModel.forward``.
        """
        base = self.transformer(input_ids, document_ids=document_ids, return_dict=True, facts=facts, **inputs)
        hidden = base.last_hidden_state
        loss = None
        if labels is not None:
            targets = next_token_targets(labels, document_ids)
            count = num_items_in_batch
            if count is None:
                count = (targets != IGNORE).sum()
            target_index = None if facts is None else facts.target_index
            loss = self.lm_head(hidden, targets, target_index) / count
        # The loss needs no stored logits: for 8 x 2048 tokens they would take 1.65 GB in bf16 and a second product
        # with the largest matrix. A caller that counts the items of a batch runs a training or evaluation loop,
        # which reads the loss alone; any other caller expects logits beside the loss, as Transformers returns them.
        if skip_logits is None:
            skip_logits = labels is not None and num_items_in_batch is not None
        if skip_logits and loss is None:
            raise UserError("skip_logits=True leaves nothing to return without labels")
        logits = None
        if not skip_logits:
            kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
            logits = self.lm_head(kept)
        output = CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=base.past_key_values,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
        )
        return self._as_requested(output, return_dict)


class GPTJForSequenceClassification(GPTJWithHead):
    """GPT-J with a label head on each row's last real token, as ``transformers.GPTJForSequenceClassification``."""

    new_head_allowed = True
    loss_type = "ForSequenceClassification"

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.score = Linear(config.n_embd, config.num_labels, config.initializer_range, bias=False)

    @with_arguments_of(GPTJModel.forward)
    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        num_items_in_batch: int | float | Tensor | None = None,
        return_dict: bool | None = None,
        facts: BatchFacts | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Compute label logits, and with labels their loss.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), nonzero for real tokens; it also tells where each row ends.
            labels: (B) class ids, (B, num_labels) floats of 0 and 1, or (B) or (B, num_labels) floats to
                regress on, as ``config.problem_type`` says. IGNORE rows of class ids are no targets.
            loss_weights: shaped like ``labels``; factors of their losses. The mean is still over targets.
            num_items_in_batch: divides the summed loss, in place of the batch's own number of targets.
            **inputs: other arguments of ``GPTJModel.forward``.

        Raises:
            UserError: several rows of ``input_ids`` without a mask or pad id to find their ends by; and as
                ``GPTJModel.forward``.
        """
        # Causality hides padding on the right from every real token, and only real tokens are read below. Without
        # the mask the fused kernels stay fast; the hidden states of padding differ.
        hides = attention_mask
        if facts is not None and facts.right_padded:
            hides = None
        base = self.transformer(input_ids, attention_mask=hides, return_dict=True, facts=facts, **inputs)
        hidden = base.last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)
        last = self._last_tokens(input_ids, attention_mask, hidden)
        logits = self.score(hidden[rows, last])
        loss = None
        if labels is not None:
            losses = self._losses(logits, labels)
            if loss_weights is not None:
                losses = losses * loss_weights.view_as(losses)
            count = num_items_in_batch
            if count is None:
                count = self._count_targets(labels)
            loss = losses.sum() / count
        output = SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            past_key_values=base.past_key_values,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
        )
        return self._as_requested(output, return_dict)

    def _last_tokens(self, input_ids: Tensor | None, attention_mask: Tensor | None, hidden: Tensor) -> Tensor:
        """Return the (B) position of each row's last real token: by mask, else by pad id, else the last one."""
        rows, length = hidden.shape[:2]
        pad = self.config.pad_token_id
        if attention_mask is not None and attention_mask.dim() == 2:
            # With a cache the mask also covers past tokens.
            real = attention_mask[:, -length:] != 0
        elif pad is not None and input_ids is not None:
            real = input_ids != pad
        elif rows == 1 or input_ids is None:
            real = torch.ones(rows, length, dtype=torch.bool, device=hidden.device)
        else:
            raise UserError(
                "cannot tell where the rows of the batch end: give attention_mask, or set config.pad_token_id"
            )
        positions = torch.arange(length, device=hidden.device)
        return (real * positions).argmax(dim=-1)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the fp32 loss of each label, (B) or (B, num_labels)."""
        config = self.config
        if config.problem_type is None:
            # Kept in the config, as in Transformers: the first labels decide for all later calls.
            config.problem_type = _problem_type(config.num_labels, labels)
        # fp32 softmax and sums: bf16 has three decimal digits.
        logits = logits.float()
        if config.problem_type == "single_label_classification":
            return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="none")
        targets = labels.float().view_as(logits)
        if config.problem_type == "regression":
            return F.mse_loss(logits, targets, reduction="none")
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")

    def _count_targets(self, labels: Tensor) -> int | Tensor:
        if self.config.problem_type == "single_label_classification":
            return (labels != IGNORE).sum()
        return labels.numel()


def _problem_type(num_labels: int, labels: Tensor) -> str:
    """Infer the problem type as Transformers does."""
    if num_labels == 1:
        return "regression"
    if labels.is_floating_point():
        return "multi_label_classification"
    return "single_label_classification"


class GPTJForQuestionAnswering(GPTJWithHead):
    """GPT-J with a span head on every token, as ``transformers.GPTJForQuestionAnswering``."""

    new_head_allowed = True
    loss_type = "ForQuestionAnswering"

    def __init__(self, config: GPTJConfig) -> None:
        if config.num_labels != 2:
            # Transformers would build a head of this size, and could not read the folder that we write.
            raise UserError(f"a span has 2 labels, start and end, not {config.num_labels}; set num_labels=2")
        super().__init__(config)
        self.qa_outputs = Linear(config.n_embd, 2, config.initializer_range)

    @with_arguments_of(GPTJModel.forward)
    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        num_items_in_batch: int | float | Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
        """Compute the logits of answer starts and ends, and with both positions the mean of their losses.

        Args:
            input_ids: (B, T) token ids.
            start_positions, end_positions: (B) first and last token of the answer. As in Transformers a negative
                position counts as 0, and T or more is no target.
            num_items_in_batch: divides the summed loss, in place of the batch's own number of targets.
            **inputs: other arguments of ``GPTJModel.forward``; ``use_cache`` is ignored, an answer has no next token.
        """
        inputs["use_cache"] = False
        base = self.transformer(input_ids, return_dict=True, **inputs)
        start_logits, end_logits = self.qa_outputs(base.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss = _position_loss(start_logits, start_positions, num_items_in_batch)
            end_loss = _position_loss(end_logits, end_positions, num_items_in_batch)
            loss = (start_loss + end_loss) / 2
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
        output = QuestionAnsweringOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
        )
        return self._as_requested(output, return_dict)


def _position_loss(logits: Tensor, positions: Tensor, num_items_in_batch: int | float | Tensor | None) -> Tensor:
    """Return the scalar fp32 loss of positions (B) in logits (B, T): the mean, or the sum if items are counted."""
    beyond = logits.shape[1]
    targets = positions.flatten().clamp(0, beyond)
    reduction = "mean" if num_items_in_batch is None else "sum"
    return F.cross_entropy(logits.float(), targets, ignore_index=beyond, reduction=reduction)
