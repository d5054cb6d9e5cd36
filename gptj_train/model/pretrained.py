"""Reading and writing of Transformers folders: the base class of the trunk and of every task head."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Self

import torch
from torch import nn

from gptj_train.atomic_write import scratch_folder
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.layers import Linear
from gptj_train.weights.checkpoint_weights import open_weights
from gptj_train.weights.hf_writer import MAX_SHARD_BYTES, install_model, write_weights


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
        """Read an HF folder (safetensors or .bin, sharded or not) or a training checkpoint into a model in eval mode.

        Args:
            dtype: of the parameters; None keeps what is stored.

        Raises:
            UserError: a folder without GPT-J config or weights, or weights that do not match the config.
        """
        config = GPTJConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = cls(config)
        with open_weights(folder) as weights:
            shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
            tied = frozenset({"lm_head.weight"} if config.tie_word_embeddings else ())
            stored = weights.match(shapes, tied, model.new_head_allowed)
            tensors = {name: weights.tensor(place).to(dtype) for name, place in stored.items()}
        model.load_state_dict(tensors, strict=False, assign=True)
        if new := shapes.keys() - stored.keys():
            _initialise_head(model, new, config.initializer_range, next(iter(tensors.values())).dtype)
        model.tie_weights()
        return model.requires_grad_().eval()

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """Write config.json and safetensors that Transformers loads, once all of them are finished.

        In a folder that exists, earlier weights and config give way; other files stay.

        Args:
            dtype: of the written tensors; None keeps the parameters' own.
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


def _initialise_head(model: nn.Module, names: set[str], std: float, dtype: torch.dtype) -> None:
    """Fresh weights for a head that the folder, one of another task, does not have."""
    logging.getLogger(__name__).warning("new head, not in the folder: %s", ", ".join(sorted(names)))
    for name, child in model.named_children():
        if any(parameter.startswith(f"{name}.") for parameter in names):
            assert isinstance(child, Linear)
            fresh = Linear(child.in_features, child.out_features, std, bias=f"{name}.bias" in names)
            setattr(model, name, fresh.to(dtype))
