"""Fine-tune GPT-J 6B with DeepSpeed on the hardware you have."""

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
