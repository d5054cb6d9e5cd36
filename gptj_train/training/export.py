"""The trained model as an HF folder, from the fp32 master weights, one parameter at a time."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gptj_train.data.tokenizer import Tokenizer
from gptj_train.model.config import GPTJConfig
from gptj_train.training.engine import Engine
from gptj_train.training.model_files import ModelFiles
from gptj_train.weights.checkpoint import CheckpointWeights
from gptj_train.weights.hf_writer import DTYPES, replace_folder, write_weights
from gptj_train.weights.pretrained import class_of


def export(engine: Engine, model_files: ModelFiles, folder: str | Path, dtype: str) -> Path:
    """Write weights, config and tokenizer files that Transformers loads unchanged. Collective.

    Rank 0 holds one tensor besides its own part; the folder appears whole or not at all.

    Args:
        dtype: bf16, fp16 or fp32.
    """
    target = Path(folder)
    if engine.rank == 0:
        _write(target, engine.full_parameters(), engine.shapes, model_files, dtype)
    else:
        deque(engine.full_parameters(), maxlen=0)  # takes part in the gathering
    engine.wait()
    return target


def export_checkpoint(checkpoint: Path, folder: str | Path, dtype: str) -> None:
    """The same from a training checkpoint, whatever number of ranks wrote it, by one process without DeepSpeed.

    Args:
        dtype: bf16, fp16 or fp32.

    Raises:
        ValueError: a damaged checkpoint.
    """
    with CheckpointWeights(checkpoint) as weights:
        architecture = class_of(checkpoint).__name__
        model_files = ModelFiles(GPTJConfig.from_pretrained(checkpoint), architecture, Tokenizer.load(checkpoint))
        shapes = {name: torch.Size(weights.form(name)[0]) for name in weights.names()}
        _write(Path(folder), ((name, weights.tensor(name)) for name in shapes), shapes, model_files, dtype)


def _write(
    target: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, torch.Size],
    model_files: ModelFiles,
    dtype: str,
) -> None:
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        write_weights(scratch, tensors, shapes, DTYPES[dtype])
        model_files.save(scratch, DTYPES[dtype])
        replace_folder(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
