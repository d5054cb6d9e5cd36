"""The typed config of each recipe, composed of the schemas that live beside their consumers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal

from omegaconf import DictConfig

from gptj_train.alternative_keys import choose_alternatives
from gptj_train.data.evaluation_config import EvaluationDataConfig
from gptj_train.data.held_out_share import HeldOutKeys
from gptj_train.data.labelled import LabelledDataConfig
from gptj_train.data.squad import QADataConfig
from gptj_train.data.text_config import DataConfig
from gptj_train.errors import UserError
from gptj_train.initial_model import DROPOUT, use_initial_model
from gptj_train.launch.hub import HubKeys
from gptj_train.launch.machine import MachineKeys
from gptj_train.launch.spelling import owner_of
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.lora import LoraConfig
from gptj_train.model.quantized import Quantization
from gptj_train.schema import PlainText, schema
from gptj_train.tasks.classification import ClassificationTaskConfig
from gptj_train.tasks.question_answering import QATaskConfig
from gptj_train.tracking import TrackingConfig
from gptj_train.training.quantized_base import base_settings, check_quantize
from gptj_train.training.trainer_config import TrainerConfig
from gptj_train.training.zero_config import EngineConfig
from gptj_train.weights.hf_writer import parse_size


@schema
class ModelConfig:
    """Shape of a model built from random weights, in GPTJConfig's names.

    With ``init_from`` its config.json replaces everything but dropout.
    """

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
class FinetuneConfig(TrainerConfig, HubKeys, HeldOutKeys):
    """The keys that the fine-tuning recipes share."""

    sequence_length: int
    resume: str
    init_from: str | None
    tokenizer: str | None
    tokenizer_mismatch: Literal["error", "allow"]
    add_tokens: list[str]
    export_dtype: Literal["bf16", "fp16", "fp32"]
    export_shard_size: str
    plan: Literal["warn", "error", "off"]
    quantize: Quantization
    model: ModelConfig
    lora: LoraConfig
    engine: EngineConfig
    tracking: TrackingConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length < 2:
            raise UserError(f"sequence_length must be at least 2, got {self.sequence_length}")
        parse_size(self.export_shard_size)
        check_quantize(self.quantize, self.lora, self.engine)
        if self.optim.lora_lr_ratio != 1 and not self.lora.rank:
            raise UserError("optim.lora_lr_ratio needs lora=adapters; without adapters it would do nothing")

    def numeric_settings(self) -> dict[str, Any]:
        return super().numeric_settings() | base_settings(self.quantize, self.lora, self.init_from)

    @staticmethod
    def adjust(composed: DictConfig, given: Mapping[str, str]) -> None:
        """Adjust the composed YAML to ``init_from`` before it is typed; ``given`` are the command line's values."""
        choose_alternatives(composed, set(given))
        use_initial_model(composed, set(given))


@schema
class ClmConfig(FinetuneConfig):
    """recipes/clm.py"""

    sample_prompt: PlainText | None
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
class PlanConfig(FinetuneConfig, MachineKeys):
    """recipes/plan.py, for presets of any task."""

    recipe: Literal["clm", "classification", "qa"]
    sample_prompt: PlainText | None
    data: dict[str, Any]
    task: dict[str, Any]

    @staticmethod
    def adjust(composed: DictConfig, given: Mapping[str, str]) -> None:
        """Let the preset decide the recipe, and with it the head."""
        FinetuneConfig.adjust(composed, given)
        if composed.recipe is None:
            composed.recipe = owner_of(given.get("config", "")) or "clm"


@schema
class CheckpointConfig(HubKeys):
    """The keys that the recipes share that read a finished model."""

    checkpoint: str
    dtype: Literal["bf16", "fp16", "fp32"] | None
    quantize: Quantization
    batch_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}")


@schema
class EvaluateConfig(CheckpointConfig):
    """recipes/evaluate.py; ``task`` applies to question answering only."""

    output_dir: str | None
    sequence_length: int | None
    data: EvaluationDataConfig
    task: QATaskConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length is not None and self.sequence_length < 2:
            raise UserError(f"sequence_length must be at least 2, got {self.sequence_length}")


@schema
class HarnessConfig(CheckpointConfig):
    """recipes/harness.py; the names are those of ``lm_eval.simple_evaluate``."""

    tasks: list[str]
    include_path: str | None
    num_fewshot: int | None
    limit: int | None
    output_dir: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit must be at least 1, got {self.limit}")


@schema
class GenerateConfig(CheckpointConfig):
    """recipes/generate.py; the options are those of ``GPTJForCausalLM.generate``."""

    prompt: PlainText | None
    prompts: str | None
    chat: bool
    chat_template: PlainText | None
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
    def stop_strings(self) -> list[str]:
        """``stop`` with newlines and tabs: shell and Hydra pass \\n and \\t on as two characters."""
        return [text.replace("\\n", "\n").replace("\\t", "\t") for text in self.stop]

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ``GPTJForCausalLM.generate``."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "max_length": self.max_length,
            "repetition_penalty": self.repetition_penalty,
            "num_beams": self.num_beams,
        }
        if self.num_beams > 1:
            # Beam search does not sample: generate refuses do_sample beside it.
            options["length_penalty"] = self.length_penalty
        else:
            options |= {
                "do_sample": self.do_sample,
                "temperature": self.temperature,
                "top_k": self.top_k,
                "top_p": self.top_p,
                "seed": self.seed,
            }
        return options


@schema
class TrainTokenizerConfig:
    """recipes/train_tokenizer.py"""

    output_dir: str
    vocab_size: int
    special_tokens: list[str]
    max_megabytes: float
    data: DataConfig

    def __post_init__(self) -> None:
        # 256 bytes, the special tokens, and at least one merged pair.
        fewest = 258 + len(self.special_tokens)
        if self.vocab_size < fewest:
            raise UserError(f"vocab_size must be at least {fewest}: 256 bytes and the special tokens come first")
        if self.max_megabytes <= 0:
            raise UserError(f"max_megabytes must be above 0, got {self.max_megabytes}")


@schema
class ImportMeshConfig(HubKeys):
    """recipes/import_mesh.py"""

    source: str
    output_dir: str
    dtype: Literal["bf16", "fp16", "fp32"]
    tokenizer: str | None
    model: ModelConfig


@schema
class ExportConfig:
    """recipes/export.py"""

    run: str
    output_dir: str | None
    dtype: Literal["bf16", "fp16", "fp32"]
    export_shard_size: str


def model_config_of(model: ModelConfig, init_from: str | None) -> GPTJConfig:
    """Return the config of the model to train: that of ``init_from`` if given, else the one described by ``model``.

    A dropout above 0 in ``model`` applies in both cases: it belongs to the training, not to the weights.

    Raises:
        UserError: no GPT-J config.json in ``init_from``, or sizes that do not fit together.
    """
    if init_from is None:
        shape = {field.name: getattr(model, field.name) for field in fields(model)}
        return GPTJConfig(**shape)
    dropout = {}
    for name in DROPOUT:
        probability = getattr(model, name)
        if probability > 0:
            dropout[name] = probability
    return replace(GPTJConfig.from_pretrained(init_from), **dropout)
