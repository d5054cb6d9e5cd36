"""The next step's batches, built while the device computes this one's."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from gptj_train.tasks.task import Batch, Task


class PrefetchedBatches:
    """A rank's training batches of the step that is asked for; those of the step after it are built meanwhile.

    Batches are a pure function of the step: what was built for a step that is never asked for is dropped.
    """

    def __init__(self, task: Task, rank: int, world_size: int) -> None:
        self._task = task
        self._rank = rank
        self._world_size = world_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._step = -1
        self._next: Future[list[Batch]] | None = None

    def at(self, step: int) -> list[Batch]:
        """Return the micro-batches of an optimizer step; an exception of the task is raised here."""
        if self._next is None or self._step != step:
            self._next = self._build(step)
        batches = self._next.result()
        self._step = step + 1
        self._next = self._build(self._step)
        return batches

    def _build(self, step: int) -> Future[list[Batch]]:
        return self._thread.submit(self._task.training_batches, step, self._rank, self._world_size)
