"""The language-model head: logits, or the loss without them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gptj_train.model.layers import Linear
from gptj_train.model.loss import IGNORE, linear_cross_entropy


class LMHead(Linear):
    """Hidden states -> logits, or -> the summed loss at given targets without storing the logits.

    Both go through this module's forward, because ZeRO-3 gathers a module's weights only there.
    """

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        target_index: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, V); with targets (B, T) -> scalar fp32, the sum of their losses.

        ``target_index`` (M): positions of the targets in the flattened (B * T) batch, where they are known.
        """
        if targets is None:
            return super().forward(hidden)
        rows = hidden.flatten(0, -2)
        if torch.compiler.is_compiling():
            # The chunked loss leaves out positions without target. A graph of fixed shapes takes all of them.
            logits = super().forward(rows).float()
            return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return linear_cross_entropy(rows, self.weight, self.bias, targets.flatten(), target_index)
