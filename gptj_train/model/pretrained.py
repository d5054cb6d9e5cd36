"""The base class of the trunk and of every task head: reads and writes Transformers folders."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import nn

from gptj_train.atomic_write import scratch_folder
from gptj_train.errors import UserError
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.layers import Linear
from gptj_train.model.outputs import ModelOutput
from gptj_train.weights.checkpoint_weights import open_weights
from gptj_train.weights.hf_writer import MAX_SHARD_BYTES, install_model, write_weights
from gptj_train.weights.stored import is_finite

OutputT = TypeVar("OutputT", bound=ModelOutput)


class PreTrained(nn.Module):
    """A module built from a GPTJConfig, with ``from_pretrained`` and ``save_pretrained``.

    Attributes:
        new_head_allowed: weights of another task may initialize this model; its head then keeps its fresh weights.
    """

    config: GPTJConfig
    new_head_allowed = False

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.config = config

    def tie_weights(self) -> None:
        """Share parameters as the config asks for; the base class has none to share."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> Self:
        """Read a Transformers folder or a training checkpoint into a model in eval mode.

        The weights may be safetensors or ``pytorch_model.bin``, sharded or not.

        Args:
            folder: a local folder.
            dtype: of the parameters; None keeps the stored one.

        Raises:
            UserError: a folder without a GPT-J config or weights, or weights that do not match the config.
        """
        config = GPTJConfig.from_pretrained(folder)
        # Without memory and initialization: every parameter but a new head is replaced below.
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        tied = frozenset({"lm_head.weight"}) if config.tie_word_embeddings else frozenset()
        tensors = {}
        with open_weights(folder) as weights:
            stored_names = weights.match(shapes, tied, model.new_head_allowed)
            for name, stored_name in stored_names.items():
                stored = weights.tensor(stored_name)
                weights.check_finite(stored_name, stored)
                tensors[name] = stored.to(dtype)
                if dtype == torch.float16 and not is_finite(tensors[name]):
                    raise UserError(f"{folder}: {stored_name} has values beyond fp16's range; take bf16 or fp32")
        # assign: the parameters become these tensors, memory-mapped files included, instead of copies of them.
        model.load_state_dict(tensors, strict=False, assign=True)
        missing = shapes.keys() - stored_names.keys()
        if missing:
            loaded_dtype = next(iter(tensors.values())).dtype
            _initialize_head(model, missing, config.initializer_range, loaded_dtype)
        # Assigning gave the two names of a tied weight one parameter each.
        model.tie_weights()
        return model.requires_grad_().eval()

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Write config.json and safetensors that Transformers loads.

        An existing folder keeps its other files; its weights and config are replaced once the new ones are complete.

        Args:
            folder: created with its parents.
            dtype: of the written tensors; None keeps the parameters' own.
            max_shard_bytes: size above which the weights are split into several files.

        Raises:
            OSError: no space left, or the folder cannot be written; it then keeps its earlier files.
        """
        target = Path(folder)
        parameters = dict(self.named_parameters())
        dtype = dtype or next(iter(parameters.values())).dtype
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        with scratch_folder(target) as finished:
            write_weights(finished, parameters.items(), shapes, dtype=dtype, max_shard_bytes=max_shard_bytes)
            self.config.dtype = str(dtype).removeprefix("torch.")
            self.config.save_pretrained(finished, architecture=type(self).__name__)
            install_model(finished, target)

    def _as_requested(self, output: OutputT, return_dict: bool | None) -> OutputT | tuple[Any, ...]:
        """Return the output itself or its tuple; None asks the config."""
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()


def _initialize_head(model: nn.Module, missing: set[str], std: float, dtype: torch.dtype) -> None:
    """Give a head that the folder lacks, being of another task, fresh weights."""
    logging.getLogger(__name__).warning("new head, not in the folder: %s", ", ".join(sorted(missing)))
    for name, child in model.named_children():
        if f"{name}.weight" not in missing:
            continue
        assert isinstance(child, Linear)
        has_bias = child.bias is not None
        # Built anew rather than filled: the meta device gave it no memory.
        fresh = Linear(child.in_features, child.out_features, std, bias=has_bias)
        setattr(model, name, fresh.to(dtype))
