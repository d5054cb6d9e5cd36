"""Fine-tune GPT-J 6B with DeepSpeed on the hardware you have."""

from gptj_train.model.config import GPTJConfig
from gptj_train.weights.pretrained import (
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
)

__all__ = [
    "GPTJConfig",
    "GPTJForCausalLM",
    "GPTJForQuestionAnswering",
    "GPTJForSequenceClassification",
    "GPTJModel",
]
