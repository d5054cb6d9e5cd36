"""Check a run's folder before the run starts."""

from __future__ import annotations

import os
from pathlib import Path

from gptj_train.errors import UserError
from gptj_train.launch.preemption import STOP_FILE


def check_run_folder(output_dir: str) -> None:
    """Check that a run can write to this folder, without writing anything yet.

    Raises:
        UserError: it cannot, or the folder holds a stop file: a scheduler would restart a stopped run forever.
    """
    folder = Path(output_dir)
    try:
        if (folder / STOP_FILE).exists():
            raise UserError(f"{folder / STOP_FILE} stops this run; remove it to resume")
        # The folder may not exist yet: what counts is the nearest parent that does.
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        usable = bool(output_dir.strip()) and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    except OSError as error:
        raise UserError(f"output_dir={output_dir[:100]}: {error.strerror}") from None
    if not usable:
        raise UserError(f"output_dir={output_dir}: not a writable folder; give another one")
