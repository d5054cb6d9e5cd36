"""Bytes that a forward keeps for the backward, and those of the loss."""

from __future__ import annotations

from gptj_train.model.loss import CHUNK
from gptj_train.planning.run_plan import RunPlan

_READS_LAYER_NORM = ("q_proj", "k_proj", "v_proj", "fc_in")
"""Matrices that multiply the layer norm's output."""


def activations(plan: RunPlan, *, on_gpu: bool) -> float:
    """Return the bytes that the forward of a micro-batch keeps, and what the backward of one block adds."""
    cfg = plan.cfg
    tokens = cfg.micro_batch_size * cfg.sequence_length
    hidden = plan.element * tokens * plan.model_config.n_embd
    inner = plan.element * tokens * plan.model_config.inner_size
    # Whatever is trained: a block's input, queries, keys, values and the attention's output; what goes into the MLP's
    # activation function.
    common = 5 * hidden + inner
    layer_norm, mlp_output = _inputs_of_trained(plan, hidden, inner)
    dropped = _dropped_inputs(plan, tokens, on_gpu)
    everything = common + layer_norm + mlp_output + sum(dropped.values())
    in_attention = sum(size for name, size in dropped.items() if name not in ("fc_in", "fc_out"))
    kept_of_block = {
        "none": everything,
        "gelu": everything - mlp_output - dropped.get("fc_out", 0),
        # The recomputation starts from the layer norm's output.
        "mlp": common - inner + hidden + in_attention,
        "block": hidden,
    }
    kept = kept_of_block[cfg.engine.activation_checkpointing]
    # What one block does not keep exists once more, while the backward recomputes it.
    return plan.model_config.n_layer * kept + max(0, everything - kept)


def _inputs_of_trained(plan: RunPlan, hidden: float, inner: float) -> tuple[float, float]:
    """Return the bytes of the inputs that trained matrices keep for their gradients: layer norm's and MLP's output.

    A frozen matrix keeps no input. An adapter keeps its own, a copy if it has dropout (``_dropped_inputs``).
    """
    if plan.sizes.trains_matrices:
        return hidden, inner
    if plan.cfg.lora.dropout > 0:
        return 0, 0
    adapters = plan.sizes.adapters
    reads_layer_norm = any(name in adapters for name in _READS_LAYER_NORM)
    return hidden * reads_layer_norm, inner * ("fc_out" in adapters)


def _dropped_inputs(plan: RunPlan, tokens: int, on_gpu: bool) -> dict[str, float]:
    """Return the bytes of the adapters' inputs after dropout, and of its masks, by matrix of a block."""
    if not plan.sizes.adapters or plan.cfg.lora.dropout == 0:
        return {}
    # CUDA's dropout keeps a byte for each element, the CPU's a factor in the compute precision.
    mask = 1 if on_gpu else plan.element
    return {name: (plan.element + mask) * tokens * width for name, width in plan.sizes.adapters.items()}


def loss_memory(plan: RunPlan) -> float:
    """Return the bytes of the language model's loss, which is computed in chunks of tokens (model/loss.py)."""
    if not any(name.startswith("lm_head") for name in plan.sizes.shapes):
        return 0.0  # a few logits for each text or token
    vocabulary = plan.model_config.vocab_size
    tokens = plan.cfg.micro_batch_size * plan.cfg.sequence_length
    # fp32 logits of a chunk and their gradient.
    logits = 8.0 * min(CHUNK, tokens) * vocabulary
    if "lm_head.weight" not in plan.sizes.trained:
        return logits
    # The gradient of the head: summed over the chunks in fp32, then copied to the weights' precision.
    return logits + (4 + plan.element) * plan.model_config.n_embd * vocabulary
