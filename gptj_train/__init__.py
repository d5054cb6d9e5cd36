"""Fine-tune GPT-J 6B with DeepSpeed on the hardware you have."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Before torch, whose import takes seconds: it notes which process launched this one, in case that one dies early.
from gptj_train.launch import launchers as _launchers  # noqa: F401

if TYPE_CHECKING:
    from gptj_train.model.gptj import GPTJModel
    from gptj_train.model.gptj_config import GPTJConfig
    from gptj_train.model.heads import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification

__all__ = [
    "GPTJConfig",
    "GPTJForCausalLM",
    "GPTJForQuestionAnswering",
    "GPTJForSequenceClassification",
    "GPTJModel",
]

_MODULES = {
    "GPTJConfig": "gptj_train.model.gptj_config",
    "GPTJModel": "gptj_train.model.gptj",
    "GPTJForCausalLM": "gptj_train.model.heads",
    "GPTJForQuestionAnswering": "gptj_train.model.heads",
    "GPTJForSequenceClassification": "gptj_train.model.heads",
}


def __getattr__(name: str) -> Any:
    """Import a model class on first use: torch takes seconds, which processes that tokenize need not spend."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
