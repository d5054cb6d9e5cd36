"""The trained model as an HF folder, from the fp32 master weights, one parameter at a time."""

from __future__ import annotations

import shutil
from collections import deque
from pathlib import Path

from gptj_train.training.engine import Engine
from gptj_train.training.model_files import ModelFiles
from gptj_train.weights.hf_writer import DTYPES, replace_folder, write_weights


def export(engine: Engine, model_files: ModelFiles, folder: str | Path, dtype: str) -> Path:
    """Write weights, config and tokenizer files that Transformers loads unchanged. Collective.

    Rank 0 holds one tensor besides its own part; the folder appears whole or not at all.

    Args:
        dtype: bf16, fp16 or fp32.
    """
    target = Path(folder)
    if engine.rank != 0:
        deque(engine.full_parameters(), maxlen=0)  # takes part in the gathering
        engine.wait()
        return target
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        write_weights(scratch, engine.full_parameters(), engine.shapes, DTYPES[dtype])
        model_files.save(scratch, DTYPES[dtype])
        replace_folder(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    engine.wait()
    return target
