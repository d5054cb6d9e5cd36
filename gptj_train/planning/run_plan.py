"""What a plan is made of: the shapes of a model's parameters and the settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import nn

from gptj_train.config import ClassificationConfig, FinetuneConfig, PlanConfig, QAConfig
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.heads import (
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJWithHead,
)
from gptj_train.model.lora import with_lora
from gptj_train.training.disk_space import disk_needed
from gptj_train.weights.stored import is_adapter

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of an element."""

# DeepSpeed's defaults in elements (runtime/zero/config.py), which engine.deepspeed may change.
_ZERO_DEFAULTS = {"reduce_bucket_size": 5e8, "stage3_max_live_parameters": 1e9, "sub_group_size": 1e9}

_HEADS: dict[str, type[GPTJWithHead]] = {
    "clm": GPTJForCausalLM,
    "classification": GPTJForSequenceClassification,
    "qa": GPTJForQuestionAnswering,
}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelSizes:
    """Shapes of a model's parameters by name, and counts of their elements.

    Attributes:
        shapes: of all parameters.
        trained: of the trained ones.
    """

    shapes: Shapes
    trained: Shapes

    @staticmethod
    def of(module: nn.Module) -> ModelSizes:
        """Return the sizes of a module, which may be on the meta device."""
        shapes, trained = {}, {}
        for name, parameter in module.named_parameters():
            shapes[name] = tuple(parameter.shape)
            if parameter.requires_grad:
                trained[name] = tuple(parameter.shape)
        return ModelSizes(shapes, trained)

    # Cached, because advice plans thousands of settings of one model.

    @cached_property
    def all_elements(self) -> int:
        return _count(self.shapes)

    @cached_property
    def trained_elements(self) -> int:
        return _count(self.trained)

    @cached_property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(prod(shape) for shape in self.shapes.values())

    @cached_property
    def largest_trained(self) -> int:
        return max(prod(shape) for shape in self.trained.values())

    @cached_property
    def exported_elements(self) -> int:
        """Elements of the exported model, into whose weights adapters are merged."""
        return _count({name: shape for name, shape in self.shapes.items() if not is_adapter(name)})

    @cached_property
    def matrix_elements(self) -> int:
        """Elements of the matrices that every token is multiplied with; the embedding is a look-up."""
        return self._matrix_elements("")

    @cached_property
    def not_recomputed_elements(self) -> int:
        """Elements of the matrices that block recomputation leaves out.

        The head, and each block's last product: no gradient needs its result.
        """
        return self._matrix_elements("lm_head") + self._matrix_elements("fc_out.weight")

    @cached_property
    def fc_in_elements(self) -> int:
        return self._matrix_elements("fc_in.weight")

    @cached_property
    def trains_matrices(self) -> bool:
        """Whether the backward computes gradients of the large matrices, not of adapters only."""
        return self.trained_elements > self.matrix_elements / 2

    @cached_property
    def adapters(self) -> dict[str, int]:
        """Input width of the adapters by the name of their matrix, such as "q_proj"; those of one block."""
        widths = {}
        for name, shape in self.trained.items():
            if name.endswith("lora_A.weight"):
                widths[name.split(".")[-3]] = shape[1]
        return widths

    def _matrix_elements(self, part: str) -> int:
        matrices = {}
        for name, shape in self.shapes.items():
            if len(shape) == 2 and "wte" not in name and part in name:
                matrices[name] = shape
        return _count(matrices)


@dataclass(frozen=True)
class RunPlan:
    """A run to compute memory, disk and time for.

    Attributes:
        sizes: of the model's parameters.
        model_config: the model.
        cfg: config of the run.
    """

    sizes: ModelSizes
    model_config: GPTJConfig
    cfg: FinetuneConfig

    @staticmethod
    def of(cfg: FinetuneConfig, model_config: GPTJConfig) -> RunPlan:
        """Plan a run of a recipe: with the head of its task, and its adapters."""
        head = head_of(cfg)
        if head is GPTJForQuestionAnswering:
            model_config = replace(model_config, num_labels=2, id2label=None)
        with torch.device("meta"):
            module = with_lora(head(model_config), cfg.lora)
        return RunPlan(ModelSizes.of(module), model_config, cfg)

    @property
    def element(self) -> int:
        """Bytes of an element in the compute precision."""
        return BYTES[self.cfg.engine.precision]

    def zero(self, name: str) -> float:
        """Return a setting of ``engine.deepspeed.zero_optimization``, or DeepSpeed's default."""
        settings = self.cfg.engine.deepspeed.get("zero_optimization", {})
        return float(settings.get(name, _ZERO_DEFAULTS[name]))

    def disk(self) -> tuple[int, int, int]:
        """Return the bytes of a checkpoint, the largest number of checkpoints at a time, the bytes of the export."""
        cfg = self.cfg
        checkpoint, most = disk_needed(
            self.sizes.trained_elements,
            steps=range(cfg.steps),
            save_every=cfg.save_every,
            best_every=cfg.saves_best_every if _has_held_out(cfg) else 0,
            keep=cfg.keep_checkpoints,
            keep_every=cfg.keep_every,
        )
        return checkpoint, most, BYTES[cfg.export_dtype] * self.sizes.exported_elements


def _has_held_out(cfg: FinetuneConfig) -> bool:
    """Return whether a checkpoint of the best evaluation is kept beside the newest ones."""
    if isinstance(cfg, PlanConfig):
        return bool(cfg.data.get("validation")) or cfg.validation_share is not None
    return True


def head_of(cfg: FinetuneConfig) -> type[GPTJWithHead]:
    """Return the class of the model that a config's recipe trains."""
    if isinstance(cfg, PlanConfig):
        return _HEADS[cfg.recipe]
    if isinstance(cfg, ClassificationConfig):
        return _HEADS["classification"]
    if isinstance(cfg, QAConfig):
        return _HEADS["qa"]
    return _HEADS["clm"]


def _count(shapes: Shapes) -> int:
    """Return the number of elements."""
    return sum(prod(shape) for shape in shapes.values())
