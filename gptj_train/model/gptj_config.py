"""GPTJConfig: the shape of a GPT-J, with Transformers' field names and its config.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gptj_train.errors import UserError
from gptj_train.model.activations import ACTIVATIONS

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# The general names that newer Transformers code uses for GPT-J's own fields.
_ALIASES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "torch_dtype": "dtype",
}

# Far beyond any GPT-J. A config.json is untrusted: above these sizes, building the model would fill the memory before
# its weights are compared with the file's.
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
_MAY_BE_NONE = ("n_inner", "rotary_dim")
_FRACTIONS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "initializer_range")

# Written anew on saving, or derived from other keys.
_DROPPED_KEYS = {"model_type", "transformers_version", "label2id"}


@dataclass
class GPTJConfig:
    """Shape and behaviour of a GPT-J; the defaults are the 6B model.

    Field names and meanings are those of ``transformers.GPTJConfig``.

    Attributes:
        rotary_dim: dimensions of each head that rotate; None means all.
        n_inner: width of the MLP; None means 4 * n_embd.
        num_labels: taken from ``id2label`` if that is given.
        problem_type: one of PROBLEM_TYPES, or None: the first labels decide.
        dtype: of the stored weights, such as "bfloat16".
        extra: keys of a config.json without a field here; they are written back unchanged.

    Raises:
        UserError: sizes that do not fit together, a value outside its range, or an unknown activation.
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
        # Sizes first: the later checks divide by them.
        for name, largest in _LARGEST.items():
            self._check_size(name, largest)
        for name in _FRACTIONS:
            self._check_fraction(name)
        self._set_labels()
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise UserError(f"problem_type {self.problem_type!r} is unknown; choose one of {', '.join(PROBLEM_TYPES)}")
        if self.n_embd % self.n_head:
            raise UserError(f"model.n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        rotary = self.rotary_size
        # Even, because dimensions rotate in pairs.
        if rotary % 2 or not 0 < rotary <= self.head_size:
            raise UserError(f"model.rotary_dim ({rotary}) must be even and at most n_embd / n_head ({self.head_size})")
        if self.activation_function not in ACTIVATIONS:
            raise UserError(
                f"model.activation_function {self.activation_function!r} is unknown; "
                f"choose one of {', '.join(ACTIVATIONS)}"
            )

    def _check_size(self, name: str, largest: int) -> None:
        value = getattr(self, name)
        if value is None and name in _MAY_BE_NONE:
            return
        # type, not isinstance: True is an int.
        if type(value) is not int or value > largest:
            raise UserError(f"model.{name} must be a whole number of at most {largest}, got {value!r}")
        # rotary_dim has a range of its own, checked together with the head size.
        if value < 1 and name != "rotary_dim":
            raise UserError(f"model.{name} must be at least 1, got {value}")

    def _check_fraction(self, name: str) -> None:
        value = getattr(self, name)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise UserError(f"model.{name} must be a number from 0 to below 1, got {value!r}")

    def _set_labels(self) -> None:
        """Make ``id2label`` and ``num_labels`` agree; two unnamed labels, the default, stay without names."""
        if not isinstance(self.id2label, dict | None):
            raise UserError(f"id2label must name the labels by number, got {self.id2label!r}")
        if self.id2label is None and self.num_labels != 2:
            self.id2label = {label: f"LABEL_{label}" for label in range(self.num_labels)}
        if self.id2label is not None:
            # JSON keys are strings.
            self.id2label = {int(label): name for label, name in self.id2label.items()}
            self.num_labels = len(self.id2label)

    @property
    def head_size(self) -> int:
        """Dimensions of an attention head."""
        return self.n_embd // self.n_head

    @property
    def rotary_size(self) -> int:
        """Leading dimensions of each head that rotate."""
        return self.head_size if self.rotary_dim is None else self.rotary_dim

    @property
    def inner_size(self) -> int:
        """Width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    # The general names, as attributes, for code written for any Transformers config.

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
        """Build a config from the keys of a config.json; unknown keys become ``extra``.

        Raises:
            UserError: as the constructor.
        """
        known = {entry.name for entry in fields(cls)} - {"extra"}
        chosen: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for key, value in values.items():
            name = _ALIASES.get(key, key)
            if name in known:
                chosen[name] = value
            elif name not in _DROPPED_KEYS:
                extra[name] = value
        if "architectures" in chosen:
            listed = chosen["architectures"]
            # Absent or malformed is no error here: only who must choose a class needs one.
            names = listed if isinstance(listed, list) else []
            chosen["architectures"] = [name for name in names if isinstance(name, str)]
        return cls(**chosen, extra=extra)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GPTJConfig:
        """Read ``config.json`` of a Transformers folder, as data only.

        Raises:
            UserError: no such file, no JSON, another architecture than GPT-J, or as the constructor.
        """
        path = Path(folder) / "config.json"
        try:
            # Opening a named pipe would wait forever.
            if path.exists() and not path.is_file():
                raise UserError("not a regular file")
            values = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            advice = ""
            if (Path(folder) / "export" / "config.json").is_file():
                advice = f"; this is a run folder, use {Path(folder) / 'export'}"
            elif (Path(folder) / "checkpoints").is_dir():
                advice = f"; this is a run folder: export it with recipes/export.py run={folder}, then use its export"
            raise UserError(f"{path}: no readable GPT-J config.json here ({error}){advice}") from None
        if not isinstance(values, dict) or values.get("model_type", "gptj") != "gptj":
            raise UserError(f"{path}: model_type must be 'gptj'")
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None

    def to_dict(self, architecture: str | None = None) -> dict[str, Any]:
        """Return the keys of a config.json.

        Args:
            architecture: name of the model class, in place of ``architectures``.
        """
        values = asdict(self)
        extra = values.pop("extra")
        architectures = values.pop("architectures")
        if architecture is not None:
            architectures = [architecture]
        if self.dtype is not None:
            # Transformers renamed torch_dtype to dtype; with both keys, old and new versions read it.
            values["torch_dtype"] = self.dtype
        # Transformers derives it from id2label.
        del values["num_labels"]
        if self.id2label is None:
            del values["id2label"]
        else:
            values["label2id"] = {name: label for label, name in self.id2label.items()}
        header: dict[str, Any] = {"model_type": "gptj"}
        if architectures:
            header["architectures"] = architectures
        # Fields win over extra: an extra key can never change what the model is.
        return {**header, **extra, **values}

    def save_pretrained(self, folder: str | Path, architecture: str | None = None) -> None:
        """Write ``config.json``; ``architecture`` as in ``to_dict``."""
        text = json.dumps(self.to_dict(architecture), indent=2, sort_keys=True)
        (Path(folder) / "config.json").write_text(text + "\n")
