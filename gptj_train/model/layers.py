"""Linear and Embedding layers that their constructors initialize as Transformers does."""

from __future__ import annotations

from torch import Tensor, nn

from gptj_train.model.quantized import linear


class Linear(nn.Linear):
    """nn.Linear with weights from N(0, std^2) and a zero bias.

    The constructor draws them, because DeepSpeed's zero.Init partitions the weights as soon as it returns; a later
    pass over the model would find empty tensors.
    """

    def __init__(self, in_features: int, out_features: int, std: float, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.std = std
        self.draw()

    def draw(self) -> None:
        """Give the layer fresh weights."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def reset_parameters(self) -> None:
        """Skip nn.Linear's own draw, which the constructor would overwrite."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding with weights from N(0, std^2)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        nn.init.normal_(self.weight, std=std)

    def reset_parameters(self) -> None:
        """Skip nn.Embedding's own draw, which the constructor would overwrite."""
