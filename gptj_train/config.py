"""The typed config of each recipe, gathered from its owners, and its way from YAML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from gptj_train.data.labelled import LabelledDataConfig
from gptj_train.data.labelled_files import LabelledFields
from gptj_train.data.sources import DataConfig
from gptj_train.data.squad import QADataConfig
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.model.config import GPTJConfig
from gptj_train.schema import schema
from gptj_train.tasks.classification import ClassificationTaskConfig
from gptj_train.tasks.question_answering import QATaskConfig
from gptj_train.tracking import TrackingConfig
from gptj_train.training.trainer import TrainerConfig
from gptj_train.training.zero_config import EngineConfig

T = TypeVar("T")


@schema
class ModelConfig:
    """Shape of a model built from scratch; the names are GPTJConfig's. With ``init_from`` its config.json rules."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    rotary_dim: int | None
    n_inner: int | None
    activation_function: str
    layer_norm_epsilon: float
    initializer_range: float
    resid_pdrop: float
    embd_pdrop: float
    attn_pdrop: float


@schema
class FinetuneConfig(TrainerConfig):
    """What the fine-tuning recipes share."""

    sequence_length: int
    init_from: str | None
    tokenizer: str | None
    export_dtype: Literal["bf16", "fp16", "fp32"]
    model: ModelConfig
    engine: EngineConfig
    tracking: TrackingConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {self.sequence_length}")


@schema
class ClmConfig(FinetuneConfig):
    """recipes/clm.py"""

    sample_prompt: str | None
    data: DataConfig


@schema
class ClassificationConfig(FinetuneConfig):
    """recipes/classification.py"""

    data: LabelledDataConfig
    task: ClassificationTaskConfig


@schema
class QAConfig(FinetuneConfig):
    """recipes/qa.py"""

    data: QADataConfig
    task: QATaskConfig


@schema
class PrepareDataConfig(ClmConfig):
    """recipes/prepare_data.py"""

    inspect: int


@schema
class EvaluationDataConfig(DataConfig):
    """Held-out data: text, labelled texts or questions, as the checkpoint's task wants them."""

    validation: str | list[str]
    second_text_field: str | None
    label_field: str | list[str]

    @property
    def labelled(self) -> LabelledFields:
        return LabelledFields(
            text_field=self.text_field, second_text_field=self.second_text_field, label_field=self.label_field
        )


@schema
class EvaluateConfig:
    """recipes/evaluate.py; ``task`` is for question answering."""

    checkpoint: str
    output_dir: str | None
    dtype: Literal["bf16", "fp16", "fp32"] | None
    sequence_length: int | None
    batch_size: int
    data: EvaluationDataConfig
    task: QATaskConfig

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("sequence_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


@schema
class HarnessConfig:
    """recipes/harness.py; the names are those of ``lm_eval.simple_evaluate``."""

    checkpoint: str
    dtype: Literal["bf16", "fp16", "fp32"] | None
    tasks: list[str]
    include_path: str | None
    num_fewshot: int | None
    limit: int | None
    batch_size: int
    output_dir: str | None

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@schema
class GenerateConfig:
    """recipes/generate.py; the options are those of ``GPTJForCausalLM.generate``."""

    checkpoint: str
    dtype: Literal["bf16", "fp16", "fp32"] | None
    prompt: str | None
    prompts: str | None
    batch_size: int
    stop: list[str]
    max_new_tokens: int | None
    max_length: int | None
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    num_beams: int
    length_penalty: float
    seed: int | None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of ``GPTJForCausalLM.generate``: a search with beams draws nothing."""
        lengths = {"max_new_tokens": self.max_new_tokens, "max_length": self.max_length}
        chosen = {"repetition_penalty": self.repetition_penalty, "num_beams": self.num_beams}
        if self.num_beams > 1:
            return lengths | chosen | {"length_penalty": self.length_penalty}
        drawn = {"do_sample": self.do_sample, "temperature": self.temperature, "seed": self.seed}
        return lengths | chosen | drawn | {"top_k": self.top_k, "top_p": self.top_p}


@schema
class ImportMeshConfig:
    """recipes/import_mesh.py"""

    source: str
    output_dir: str
    dtype: Literal["bf16", "fp16", "fp32"]
    tokenizer: str | None
    model: ModelConfig


def model_config(model: ModelConfig, init_from: str | None, tokenizer: Tokenizer, sequence_length: int) -> GPTJConfig:
    """The model to train: ``init_from``'s own shape, or the one described; it ends texts as the tokenizer does.

    Raises:
        ValueError: a shape that does not hold together, or one too small for tokenizer or sequences.
    """
    if init_from is not None:
        shape = GPTJConfig.from_pretrained(init_from)
    else:
        shape = GPTJConfig(**{field.name: getattr(model, field.name) for field in fields(model)})  # type: ignore[arg-type]
    tokenizer.check_fits(shape.vocab_size)
    if sequence_length > shape.n_positions:
        raise ValueError(f"sequence_length {sequence_length} exceeds the model's n_positions ({shape.n_positions})")
    return replace(shape, bos_token_id=tokenizer.end_id, eos_token_id=tokenizer.end_id)


def validated(composed: DictConfig, cls: type[T]) -> T:
    """The composed YAML as the recipe's frozen dataclass.

    Raises:
        ValueError: all unknown keys, all missing values, or all wrong values, in one line.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"config: {str(error).splitlines()[0]}") from None
    assert isinstance(values, dict)
    known = set(keys_of(cls))
    unknown = [key for key in _keys_in(values, cls) if key not in known]
    if unknown:
        raise ValueError("; ".join(unknown_key_message(key, cls) for key in unknown))
    missing = [key for key in _keys_in(values, cls) if OmegaConf.is_missing(*_parent(composed, key))]
    if missing:
        raise ValueError("missing: " + ", ".join(missing) + "; give " + " ".join(f"{key}=..." for key in missing))
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise ValueError("; ".join(_complaint(detail) for detail in error.errors())) from None


def unknown_key_message(key: str, cls: type) -> str:
    """Names the nearest key that exists."""
    if any(f"{key}.".startswith(f"{name}.") for name in _open_keys(cls)):
        return f"{key!r} is not there yet; add it with +{key}=..."
    known = list(keys_of(cls))
    leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    near = get_close_matches(key, known, n=1) or [
        leaves[leaf] for leaf in get_close_matches(key.rsplit(".", 1)[-1], leaves, n=1)
    ]
    hint = f"did you mean {near[0]!r}?" if near else "run with '--cfg job' to see all keys"
    return f"unknown config key {key!r}; {hint}"


def keys_of(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of a schema's keys, groups included."""
    hints = get_type_hints(cls)
    for field in fields(cls):  # type: ignore[arg-type]
        yield prefix + field.name
        if is_dataclass(hints[field.name]):
            yield from keys_of(hints[field.name], f"{prefix}{field.name}.")  # type: ignore[arg-type]


def text_keys(cls: type, prefix: str = "") -> set[str]:
    """Dotted names of the keys whose value is a text."""
    hints = get_type_hints(cls)
    nested = {prefix + name: hint for name, hint in hints.items() if is_dataclass(hint)}
    texts = {prefix + name for name, hint in hints.items() if hint in (str, str | None)}
    return texts.union(*(text_keys(hint, f"{name}.") for name, hint in nested.items()))  # type: ignore[arg-type]


def _open_keys(cls: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the keys whose value is a dict of whatever the user likes."""
    for name, hint in get_type_hints(cls).items():
        if get_origin(hint) is dict:
            yield prefix + name
        elif is_dataclass(hint):
            yield from _open_keys(hint, f"{prefix}{name}.")


def _keys_in(values: dict[Any, Any], cls: Any, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(cls)
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict) and is_dataclass(hints.get(key)):
            yield from _keys_in(value, hints[key], f"{prefix}{key}.")


def _parent(composed: DictConfig, key: str) -> tuple[Any, str]:
    head, _, leaf = key.rpartition(".")
    return (OmegaConf.select(composed, head) if head else composed), leaf


def _complaint(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "value_error":
        message = str(detail["ctx"]["error"])
        return message if not key or key in message else f"{key}: {message}"
    if detail["type"] == "missing":
        return f"{key} is missing"
    return f"{key}: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {detail['input']!r}"
