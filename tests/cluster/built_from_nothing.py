"""What the tests of clusters share: something that is built, used and taken down, also when building it fails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class BuiltFromNothing(ABC):
    """A context manager."""

    def __enter__(self) -> Self:
        try:
            self.build()
        except BaseException:
            self.take_down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.take_down()

    @abstractmethod
    def build(self) -> None: ...

    @abstractmethod
    def take_down(self) -> None:
        """End what was built, as far as it was."""
