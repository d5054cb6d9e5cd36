"""Passes over the training data: how many steps they are, and what to point out about them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from gptj_train.counted import counted
from gptj_train.data.sampler import Sampler

_MANY = 20  # passes, after which a model is likely to know its data by heart


class Epochs:
    """The passes of a run over its training data.

    With ``data.weights`` an epoch has as many windows as all components together; each component has its own count.

    Args:
        sizes: windows or rows of each component by name; data without components has one.
        sampler: their order.
        global_batch_size: windows or rows of a step.
    """

    def __init__(self, sizes: Mapping[str, int], sampler: Sampler, global_batch_size: int) -> None:
        self._sizes, self._sampler, self._global_batch_size = sizes, sampler, global_batch_size
        self.steps_per_epoch = sum(sizes.values()) / global_batch_size

    def steps_of(self, epochs: float) -> int:
        """Return the steps that visit everything so often, rounded up."""
        # A product such as 3 * (7 / 3) may be an ulp above the whole number that it stands for.
        return math.ceil(round(epochs * self.steps_per_epoch, 6))

    def describe(self, steps: int) -> str:
        """Describe how often this number of steps visits the data, or each component of several."""
        counts = [f"{name} {count:.2f}".strip() for name, count in self._counts(steps)]
        return f"{', '.join(counts)} in {counted(steps, 'step')}"

    def warnings(self, steps: int) -> Iterator[str]:
        """Yield lines about too little data for this number of steps."""
        total = sum(self._sizes.values())
        if total < self._global_batch_size:
            yield (
                f"data.train has {counted(total, 'sample')}, fewer than global_batch_size={self._global_batch_size}: "
                "each step has some of them twice; lower global_batch_size"
            )
        many = [(name, count) for name, count in self._counts(steps) if count > _MANY]
        if many:
            counts = ", ".join(f"{name} {count:.0f}".strip() for name, count in many)
            yield (
                f"more than {_MANY} epochs ({counts}): the model may learn these samples by heart; lower max_steps "
                "or epochs, or watch eval_loss"
            )

    def _counts(self, steps: int) -> list[tuple[str, float]]:
        counts = list(zip(self._sizes, self._sampler.epochs(steps), strict=True))
        # Components without weights are one data set, which has one count.
        is_one = len({count for _, count in counts}) == 1
        return [("", counts[0][1])] if is_one else counts
