"""GenerationConfig: the defaults of generate that a folder's generation_config.json gives."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gptj_train.errors import UserError

FILE = "generation_config.json"

# Keys that say where a file comes from, what another kind of model does, or how an option works that is refused itself:
# an assistant model, a static cache. They change nothing here.
_WITHOUT_EFFECT = {
    *("transformers_version", "_from_model_config", "_commit_hash", "generation_kwargs", "decoder_start_token_id"),
    *("is_assistant", "use_mtp", "clean_up_tokenization_spaces", "disable_compile", "compile_config", "max_cache_len"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size"),
}
# Options of Transformers that are not offered, with the values besides None that switch them off: files of older
# versions write all options out. For the others 0 and 1 are token ids, seconds or sizes.
_OFF: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty", "guidance_scale", "num_beam_groups"), (1,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha", "min_p"), (0,)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "force_words_ids", "constraints"), ([],)),
    "encoder_no_repeat_ngram_size": (0,),
    "sequence_bias": ({}, []),
    "cache_implementation": ("dynamic",),
    "cache_config": ({},),
    "use_model_defaults": (True,),
    # Values that are True or a number, a text or an object.
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_logits", "renormalize_logits"), (False,)),
    **dict.fromkeys(("remove_invalid_values", "low_memory", "token_healing", "synced_gpus"), (False,)),
    **dict.fromkeys(("max_time", "top_h", "forced_bos_token_id", "forced_eos_token_id", "dola_layers"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "prefill_chunk_size"), ()),
    **dict.fromkeys(("assistant_early_exit", "prompt_lookup_num_tokens", "speculation_type"), ()),
    "continuous_batching_config": (),
}


@dataclass
class GenerationConfig:
    """Options of ``generate``, with Transformers' names, meanings and defaults; see ``GenerationMixin.generate``.

    Attributes:
        max_length, max_new_tokens: None leaves 20 new tokens, but no more than the model has positions for.
        extra: keys of a generation_config.json that are no option here; they are written back unchanged.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: list[list[int]] | None = None
    stop_strings: str | list[str] | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    output_scores: bool = False
    return_dict_in_generate: bool = False
    seed: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """Build a config from the keys of a generation_config.json; null counts as absent, unknown keys as ``extra``.

        Options that Transformers has and we do not are named in a warning unless they are off.
        """
        known = option_names()
        chosen = {}
        extra = {}
        for name, value in values.items():
            if name in known:
                if value is not None:
                    chosen[name] = value
            else:
                extra[name] = value
        without = [name for name, value in extra.items() if not changes_nothing(name, value)]
        if without:
            logging.getLogger(__name__).warning("%s: options without effect here: %s", FILE, ", ".join(without))
        return cls(**chosen, extra=extra)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GenerationConfig:
        """Read ``generation_config.json`` of a folder; without one, all options have their defaults.

        Raises:
            UserError: a file that is no JSON dictionary.
        """
        path = Path(folder) / FILE
        if not path.exists():
            return cls()
        try:
            # Opening a named pipe would wait forever.
            if not path.is_file():
                raise UserError("not a regular file")
            values = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not readable as generation options ({error})") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}: must hold a JSON dictionary of generation options")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, and ``extra``."""
        values = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name != "extra" and value != entry.default:
                values[entry.name] = value
        return {**self.extra, **values}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same as ``to_dict``; pipelines ask by this name what differs from the defaults."""
        return self.to_dict()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``generation_config.json``."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        (Path(folder) / FILE).write_text(text + "\n")

    def update(self, **values: Any) -> dict[str, Any]:
        """Set options in place and return the arguments that are none, as Transformers' GenerationConfig."""
        unused = {}
        for name, value in values.items():
            if name in option_names():
                setattr(self, name, value)
            else:
                unused[name] = value
        return unused


def option_names() -> set[str]:
    """Return the names of all options of ``generate`` that a GenerationConfig holds."""
    return {entry.name for entry in fields(GenerationConfig)} - {"extra"}


def changes_nothing(name: str, value: Any) -> bool:
    """Return whether an option that is not offered has no effect, or is switched off by its value."""
    if value is None or name.startswith("_") or name in _WITHOUT_EFFECT:
        return True
    # False and True equal 0 and 1.
    return any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in _OFF.get(name, ()))


def resolved(defaults: GenerationConfig, given: Any, options: Mapping[str, Any]) -> GenerationConfig:
    """Merge the options of one call: ``options`` win over ``given``, a config of ours or Transformers', over defaults.

    An option that is None is switched off, as in Transformers: ``top_k=None`` draws from all tokens.

    Raises:
        UserError: options that are not offered; all of them are named, with the nearest one that is.
    """
    others = options.keys() - option_names()
    unknown = sorted(name for name in others if not changes_nothing(name, options[name]))
    if unknown:
        close = get_close_matches(unknown[0], sorted(option_names()), n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; it takes {', '.join(sorted(option_names()))}"
        raise UserError(f"generate does not offer {', '.join(unknown)}{hint}")
    config = replace(defaults)
    if given is not None:
        values = given.to_dict()
        config.update(**{name: value for name, value in values.items() if value is not None})
        refused = [name for name, value in values.items() if name not in option_names() | defaults.extra.keys()]
        refused = [name for name in refused if not changes_nothing(name, values[name])]
        if refused:
            raise UserError(f"generate does not offer {', '.join(refused)}, set in generation_config")
    config.update(**options)
    if options.get("max_length") is not None and "max_new_tokens" not in options:
        # The folder's number of new tokens must not outdo the limit that this call gives.
        config.max_new_tokens = None
    for name, off in _NONE_MEANS.items():
        if getattr(config, name) is None:
            setattr(config, name, off)
    return config


# What an option has to be for its None.
_NONE_MEANS: dict[str, Any] = {
    **{"min_length": 0, "do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
    **{"no_repeat_ngram_size": 0, "num_beams": 1, "length_penalty": 1.0, "num_return_sequences": 1, "use_cache": True},
    **{"early_stopping": False, "output_scores": False, "return_dict_in_generate": False},
}
