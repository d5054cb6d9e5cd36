"""Linear and Embedding that leave their constructor initialised as Transformers does it."""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """nn.Linear with weights drawn from N(0, std) and a zero bias.

    The draw happens in the constructor because DeepSpeed's zero.Init partitions the weights as
    soon as it returns; a later pass over the model would find empty tensors.
    """

    def __init__(self, in_features: int, out_features: int, std: float, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        nn.init.normal_(self.weight, std=std)
        if bias:
            nn.init.zeros_(self.bias)

    def reset_parameters(self) -> None:
        """Spares nn.Linear's own draw, which the constructor would overwrite."""


class Embedding(nn.Embedding):
    """nn.Embedding with weights drawn from N(0, std)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        nn.init.normal_(self.weight, std=std)

    def reset_parameters(self) -> None:
        """Spares nn.Embedding's own draw, which the constructor would overwrite."""
