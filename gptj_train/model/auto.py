"""Choose the model class that a folder's config.json names."""

from __future__ import annotations

from pathlib import Path

from gptj_train.errors import UserError
from gptj_train.model.gptj import GPTJModel
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.heads import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification
from gptj_train.model.pretrained import PreTrained

_CLASSES: dict[str, type[PreTrained]] = {
    "GPTJModel": GPTJModel,
    "GPTJForCausalLM": GPTJForCausalLM,
    "GPTJForSequenceClassification": GPTJForSequenceClassification,
    "GPTJForQuestionAnswering": GPTJForQuestionAnswering,
}


def class_of(folder: str | Path) -> type[PreTrained]:
    """Return the model class that ``architectures`` in a folder's config.json names.

    Raises:
        UserError: no readable config.json, or none of our classes in it.
    """
    architectures = GPTJConfig.from_pretrained(folder).architectures
    for name in architectures:
        if name in _CLASSES:
            return _CLASSES[name]
    known = ", ".join(_CLASSES)
    raise UserError(f"{folder}/config.json: architectures is {architectures!r}; it must name one of {known}")
