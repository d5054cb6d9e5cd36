"""Whether a run can be in its folder."""

from __future__ import annotations

import os
from pathlib import Path

from gptj_train.errors import UserError
from gptj_train.launch.preemption import STOP_FILE


def check_run_folder(output_dir: str) -> None:
    """Find out before anything is loaded whether a run can be in this folder; writes nothing.

    Raises:
        UserError: it cannot be written to, or holds a stop file: a scheduler would start what is to stop again
            and again.
    """
    folder = Path(output_dir)
    try:
        if (folder / STOP_FILE).exists():
            raise UserError(f"{folder / STOP_FILE} says that this run is to stop; remove it to go on")
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        usable = bool(output_dir.strip()) and there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError as error:
        raise UserError(f"output_dir={output_dir[:100]}: {error.strerror}") from None
    if not usable:
        raise UserError(f"output_dir={output_dir}: not a folder that can be written to; give another one")
