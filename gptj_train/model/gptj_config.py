"""GPTJConfig: the shape of a GPT-J, with Transformers' field names and its config.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gptj_train.errors import UserError
from gptj_train.failed_download import failed_download
from gptj_train.model.activations import ACTIVATIONS
from gptj_train.model.config_checks import check_fields
from gptj_train.model.config_names import ALIASES, ConfigNames, default_labels, field_values, numbered, takes_aliases
from gptj_train.near_name import near_name
from gptj_train.untrusted_files import check_stays, read_json

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Far beyond any GPT-J. A config.json is untrusted: above these sizes, building the model would fill the memory before
# its weights are compared with the file's; building 2^12 blocks takes 40 s even without memory.
_LARGEST = {
    "vocab_size": 2**24,
    "n_positions": 2**20,
    "n_embd": 2**20,
    "n_layer": 2**8,
    "n_head": 2**16,
    "n_inner": 2**22,
    "rotary_dim": 2**20,
    "num_labels": 2**20,
}
_MAY_BE_NONE = ("n_inner", "rotary_dim")
_FRACTIONS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "initializer_range")

_LARGEST_CONFIG = 10_000_000  # bytes of a config.json; one with a thousand labels has 60 thousand

# Written anew on saving, or derived from other keys.
_DROPPED_KEYS = {"model_type", "transformers_version", "label2id"}


@takes_aliases
@dataclass
class GPTJConfig(ConfigNames):
    """Shape and behaviour of a GPT-J; the defaults are the 6B model.

    Field names and meanings are those of ``transformers.GPTJConfig``, and so are the other names of fields
    (``hidden_size``, ``label2id``): see ``config_names.py``.

    Attributes:
        rotary_dim: dimensions of each head that rotate; None means all.
        n_inner: width of the MLP; None means 4 * n_embd.
        num_labels: taken from ``id2label`` if that is given; setting it renews ``id2label``.
        id2label: name of each label by its number; None means LABEL_0, LABEL_1, ...
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
        check_fields(self)
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
        """Make ``id2label`` and ``num_labels`` agree; names win over their number."""
        self.id2label = default_labels(self.num_labels) if self.id2label is None else numbered(self.id2label)
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
            name = ALIASES.get(key, key)
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
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> GPTJConfig:
        """Read ``config.json`` of a Transformers folder, as data only.

        Args:
            folder: a local folder.
            **changes: fields, under any of their names, that replace those of the file.

        Raises:
            UserError: no such file, no JSON, another architecture than GPT-J, or as the constructor.
        """
        path = Path(folder) / "config.json"
        try:
            check_stays(path.parent, path.name)
            instead = failed_download(path)
            if instead is not None:
                raise UserError(f"it is {instead}")
            values = read_json(path, _LARGEST_CONFIG)
        except (OSError, ValueError) as error:
            advice = "; give the folder of a GPT-J, an export, or a hub id"
            if (Path(folder) / "export" / "config.json").is_file():
                advice = f"; this is a run folder, use {Path(folder) / 'export'}"
            elif (Path(folder) / "checkpoints").is_dir():
                advice = f"; this is a run folder: export it with recipes/export.py run={folder}, then use its export"
            near = near_name(folder)
            raise UserError(f"{path}: {near}no readable GPT-J config.json here ({_reason(error)}){advice}") from None
        if not isinstance(values, dict) or values.get("model_type", "gptj") != "gptj":
            raise UserError(f"{path}: model_type must be 'gptj'")
        changed = field_values(cls, changes)
        try:
            return cls.from_dict(_with_changes(values, changed))
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
        # Transformers refuses null here, and whole numbers in place of these fractions.
        values["rotary_dim"] = self.rotary_size
        for name in ("layer_norm_epsilon", "initializer_range"):
            values[name] = float(values[name])
        # Transformers derives it from id2label.
        del values["num_labels"]
        if self.id2label == default_labels(2):
            # Its default, which it leaves out too.
            del values["id2label"]
        else:
            values["label2id"] = self.label2id
        header: dict[str, Any] = {"model_type": "gptj"}
        if architectures:
            header["architectures"] = architectures
        # Fields win over extra: an extra key can never change what the model is.
        return {**header, **extra, **values}

    def save_pretrained(self, folder: str | Path, architecture: str | None = None) -> None:
        """Write ``config.json``; ``architecture`` as in ``to_dict``."""
        text = json.dumps(self.to_dict(architecture), indent=2, sort_keys=True)
        (Path(folder) / "config.json").write_text(text + "\n")


def _with_changes(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a config.json with some fields replaced; ``changes`` has fields' names only."""
    merged = {ALIASES.get(key, key): value for key, value in values.items()}
    names = merged.get("id2label")
    if "num_labels" in changes and isinstance(names, dict) and len(names) != changes["num_labels"]:
        # As in Transformers: other labels have other names.
        del merged["id2label"]
    changes = dict(changes)
    extra = changes.pop("extra", {})
    return {**merged, **changes, **extra}


def _reason(error: Exception) -> str:
    """Return what is wrong with a file, without the path, which the message has already."""
    return str(error.strerror) if isinstance(error, OSError) and error.strerror else str(error)
