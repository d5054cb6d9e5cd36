"""The config of a benchmark's run, composed from the package's YAML: a new key of the package needs no change here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptj_train.config import ClmConfig

_BLANKS = ("output_dir=unused", "init_from=null", "max_steps=100000", "data.train=unused")


def clm_config(*overrides: str) -> ClmConfig:
    """Return the config of ``recipes/clm.py`` with some overrides."""
    # Imported here: a peer's process does not pay for it.
    from gptj_train.config import ClmConfig
    from gptj_train.launch.command_line import compose

    return compose("clm", [*_BLANKS, *overrides], ClmConfig)
