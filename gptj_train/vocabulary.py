"""The tokenizer of a run and the model config that fits it."""

from __future__ import annotations

from dataclasses import replace

from gptj_train.config import FinetuneConfig, model_config_of
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.data.tokenizer_folder import has_tokenizer
from gptj_train.data.unused_rows import AddedToken
from gptj_train.errors import UserError
from gptj_train.model.gptj_config import GPTJConfig


def build_vocabulary(cfg: FinetuneConfig) -> tuple[Tokenizer, GPTJConfig, dict[int, list[int]]]:
    """Return the tokenizer, model config and mean rows of a run.

    Returns:
        The tokenizer with ``add_tokens``; the model config with the tokenizer's BOS, EOS and PAD ids; the embedding
        row of each added token, with the rows whose mean initializes it.

    Raises:
        UserError: no tokenizer, fewer embedding rows than token ids, fewer positions than ``sequence_length``, or
            more added tokens than unused rows.
    """
    # The model first: its messages for a folder that is no model are better than the tokenizer's.
    model_config = model_config_of(cfg.model, cfg.init_from)
    tokenizer = Tokenizer.choose(cfg.tokenizer, cfg.init_from)
    if cfg.tokenizer is not None and cfg.init_from is not None and cfg.tokenizer_mismatch == "error":
        _check_same_ids(tokenizer, cfg.tokenizer, cfg.init_from)
    tokenizer.check_fits(model_config.vocab_size)
    if cfg.sequence_length > model_config.n_positions:
        raise UserError(
            f"sequence_length {cfg.sequence_length} exceeds the model's n_positions ({model_config.n_positions}); "
            f"set sequence_length={model_config.n_positions} or less"
            + (" or raise model.n_positions" if cfg.init_from is None else "")
        )
    # GPT-J has one special token, which begins and ends documents; padding gets an unused row if there is one.
    model_config = replace(
        model_config,
        bos_token_id=tokenizer.eos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id(model_config.vocab_size),
    )
    added_tokens = [AddedToken.parse(text) for text in cfg.add_tokens]
    tokenizer, mean_rows = tokenizer.with_added_tokens(added_tokens, model_config.vocab_size)
    return tokenizer, model_config, mean_rows


def _check_same_ids(tokenizer: Tokenizer, path: str, init_from: str) -> None:
    """Raise UserError for a tokenizer whose ids have another meaning in the initial weights."""
    if has_tokenizer(init_from) and not tokenizer.gives_ids_of(Tokenizer.load(init_from)):
        raise UserError(
            f"tokenizer={path} gives other ids than the tokenizer of init_from={init_from}, whose weights know only "
            "their own; drop tokenizer=..., or set tokenizer_mismatch=allow to train the embedding anew"
        )
