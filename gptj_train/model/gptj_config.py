"""GPTJConfig: the shape of a GPT-J, with Transformers' field names and its config.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gptj_train.errors import UserError
from gptj_train.model.activations import ACTIVATIONS

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

_ALIASES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "torch_dtype": "dtype",
}


# What no GPT-J comes near; above it building the model would fill the memory before the weights are looked at.
_LARGEST = {
    "vocab_size": 2**24,
    "n_positions": 2**20,
    "n_embd": 2**20,
    "n_layer": 2**12,
    "n_head": 2**16,
    "n_inner": 2**22,
    "rotary_dim": 2**20,
    "num_labels": 2**20,
}
_SHARES = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "initializer_range")


@dataclass
class GPTJConfig:
    """Shape and behaviour of a GPT-J; the defaults are the 6B model.

    Field names and meanings are those of ``transformers.GPTJConfig``; ``id2label`` decides ``num_labels``.
    Keys of a config.json that have no field here are kept in ``extra`` and written back unchanged.

    Raises:
        UserError: when the sizes do not fit together or the activation is unknown.
    """

    vocab_size: int = 50400
    n_positions: int = 2048
    n_embd: int = 4096
    n_layer: int = 28
    n_head: int = 16
    rotary_dim: int | None = 64
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    num_labels: int = 2
    id2label: dict[int, str] | None = None
    problem_type: str | None = None
    dtype: str | None = None
    architectures: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.id2label is None and self.num_labels != 2:
            self.id2label = {label: f"LABEL_{label}" for label in range(self.num_labels)}
        if self.id2label is not None:
            self.id2label = {int(label): name for label, name in self.id2label.items()}
            self.num_labels = len(self.id2label)
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise UserError(f"problem_type {self.problem_type!r} is unknown; choose one of {', '.join(PROBLEM_TYPES)}")
        if self.n_embd % self.n_head:
            raise UserError(f"model.n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        rotary = self.rotary_size
        if rotary % 2 or not 0 < rotary <= self.head_size:
            raise UserError(f"model.rotary_dim ({rotary}) must be even and at most n_embd / n_head ({self.head_size})")
        if self.activation_function not in ACTIVATIONS:
            raise UserError(
                f"model.activation_function {self.activation_function!r} is unknown; "
                f"choose one of {', '.join(ACTIVATIONS)}"
            )

    def _check_numbers(self) -> None:
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            if value is None and name in ("n_inner", "rotary_dim"):
                continue
            if type(value) is not int or value > largest:
                raise UserError(f"model.{name} must be a whole number of at most {largest}, got {value!r}")
            if value < 1 and name != "rotary_dim":
                raise UserError(f"model.{name} must be at least 1, got {value}")
        for name in _SHARES:
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < 1:
                raise UserError(f"model.{name} must be a number from 0 to below 1, got {value!r}")
        if not isinstance(self.id2label, dict | None):
            raise UserError(f"id2label must name the labels by number, got {self.id2label!r}")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def rotary_size(self) -> int:
        """Leading dimensions of each head that rotate; all of them when ``rotary_dim`` is None."""
        return self.head_size if self.rotary_dim is None else self.rotary_dim

    @property
    def inner_size(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layer

    @property
    def num_attention_heads(self) -> int:
        return self.n_head

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTJConfig:
        """Build from the keys of a config.json; unknown keys go to ``extra``."""
        known = {f.name for f in fields(cls)} - {"extra"}
        named = {_ALIASES.get(key, key): value for key, value in values.items()}
        chosen = {key: value for key, value in named.items() if key in known}
        if "architectures" in chosen:
            listed = chosen["architectures"] if isinstance(chosen["architectures"], list) else []
            chosen["architectures"] = [name for name in listed if isinstance(name, str)]
        dropped = {"model_type", "transformers_version", "label2id"}
        extra = {key: value for key, value in named.items() if key not in known | dropped}
        return cls(**chosen, extra=extra)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GPTJConfig:
        """Read ``config.json`` of a Transformers folder, as data only.

        Raises:
            UserError: no such file, not JSON, or another architecture than GPT-J.
        """
        path = Path(folder) / "config.json"
        try:
            if path.exists() and not path.is_file():
                raise UserError("not a regular file")
            values = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: no readable GPT-J config.json here ({error})") from None
        if not isinstance(values, dict) or values.get("model_type", "gptj") != "gptj":
            raise UserError(f"{path}: model_type must be 'gptj'")
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None

    def to_dict(self, architecture: str | None = None) -> dict[str, Any]:
        """The keys of a config.json; the dtype under both names Transformers has used."""
        values = asdict(self)
        extra = values.pop("extra")
        architectures = values.pop("architectures")
        if self.dtype is not None:
            values["torch_dtype"] = self.dtype
        del values["num_labels"]
        if self.id2label is None:
            del values["id2label"]
        else:
            values["label2id"] = {name: label for label, name in self.id2label.items()}
        header: dict[str, Any] = {"model_type": "gptj"}
        if architecture is not None:
            architectures = [architecture]
        if architectures:
            header["architectures"] = architectures
        return {**header, **extra, **values}

    def save_pretrained(self, folder: str | Path, architecture: str | None = None) -> None:
        """Write ``config.json``."""
        text = json.dumps(self.to_dict(architecture), indent=2, sort_keys=True)
        (Path(folder) / "config.json").write_text(text + "\n")
