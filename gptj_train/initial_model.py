"""Let the model in ``init_from`` decide its own shape and tokenizer, before a config is typed."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from gptj_train.data.tokenizer_folder import has_tokenizer
from gptj_train.errors import UserError
from gptj_train.model.gptj_config import GPTJConfig

DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def use_initial_model(composed: DictConfig, given: set[str]) -> None:
    """Put the shape of ``init_from`` in place of a preset's, and drop a preset's tokenizer for its own.

    So config.yaml holds what is built.

    Args:
        given: keys and groups that the command line itself sets.

    Raises:
        UserError: the command line gives another shape than ``init_from`` has.
    """
    folder = OmegaConf.select(composed, "init_from", throw_on_missing=False)
    if not isinstance(folder, str) or not (Path(folder) / "config.json").is_file():
        return  # random weights, or an error that comes later with a better message
    if "tokenizer" not in given and has_tokenizer(folder):
        composed.tokenizer = None
    shape = GPTJConfig.from_pretrained(folder)
    for name in composed.model:
        value = composed.model[name]
        built = getattr(shape, name, value)  # an unknown key gets its message from the schema
        if name in DROPOUT:
            composed.model[name] = value or built
        elif value != built and given & {"model", f"model.{name}"}:
            raise UserError(
                f"model.{name}={value} contradicts init_from={folder}, which has {built}; drop it to train those "
                "weights, or set init_from=null to train random ones"
            )
        else:
            composed.model[name] = built
