"""The files that make a folder of weights a usable model: config and tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gptj_train.data.tokenizer import Tokenizer
from gptj_train.model.gptj_config import GPTJConfig


@dataclass(frozen=True)
class ModelFiles:
    """The files beside the weights, in an export and in a checkpoint.

    Attributes:
        architecture: name of the Transformers class.
    """

    config: GPTJConfig
    architecture: str
    tokenizer: Tokenizer

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write config.json, generation_config.json and the tokenizer's files.

        Args:
            dtype: of the weights beside them.
        """
        config = replace(self.config, dtype=str(dtype).removeprefix("torch."))
        config.save_pretrained(folder, self.architecture)
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: getattr(config, name) for name in names}
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
        self.save_tokenizer(folder)

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save(
            folder,
            self.config.vocab_size,
            max_length=self.config.n_positions,
            # A batch of prompts is padded before its texts: generation continues at the end of each row.
            padding_side="left" if self.architecture == "GPTJForCausalLM" else "right",
        )
