"""Export a training checkpoint as a Transformers folder, in one process without GPU or process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gptj_train.data.tokenizer import Tokenizer
from gptj_train.data.unused_rows import AddedToken
from gptj_train.errors import UserError
from gptj_train.export.adapters import MergedWeights
from gptj_train.export.card_facts import card_facts, progress
from gptj_train.export.from_engine import prompt_ids, write_export_report, write_verified
from gptj_train.export.verify import streamed_logits
from gptj_train.model.auto import class_of
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.lora import adapter_scale
from gptj_train.training.model_files import ModelFiles
from gptj_train.training.retention import best_complete, newest_complete
from gptj_train.weights.checkpoint_weights import CheckpointWeights, open_weights
from gptj_train.weights.hf_writer import DTYPES, MAX_SHARD_BYTES
from gptj_train.weights.manifest import Manifest
from gptj_train.weights.mean_rows import WithMeanRows
from gptj_train.weights.stored import StoredWeights, is_adapter


def export_checkpoint(
    run: str | Path, folder: str | Path | None, dtype: str, shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Write the export of a run as if it had ended at a checkpoint; one parameter or block is in memory at a time.

    Args:
        run: a run folder, whose best or newest complete checkpoint is taken, by its ``export_of``; or a ``step_...``
            folder.
        folder: to write, which must not exist or be empty; None replaces ``export`` in the run folder.
        dtype: bf16, fp16 or fp32.
        shard_bytes: largest size of a weight file.

    Raises:
        UserError: no complete checkpoint; a LoRA run whose base weights are unknown; ``folder`` is not empty.
        ExportError: a check of the written folder failed; no new folder is left.
    """
    # resolve: run may be a link to a step folder, whose parents say which run it belongs to.
    exports_best = _settings(Path(run)).get("export_of") == "best"
    step_folder = (best_complete(run) if exports_best else newest_complete(run)).resolve()
    run_folder = step_folder.parent.parent
    if folder is None and step_folder.parent.name != "checkpoints":
        raise UserError(f"{step_folder} is not in a run's checkpoints folder; give output_dir=...")
    target = run_folder / "export" if folder is None else _check_empty(Path(folder).absolute())

    config = GPTJConfig.from_pretrained(step_folder)
    model_class = class_of(step_folder)
    model_files = ModelFiles(config, model_class.__name__, Tokenizer.load(step_folder))
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in model_class(config).named_parameters()}
    settings = _settings(run_folder)
    state, base = Manifest.read(step_folder).state, settings.get("init_from")
    step = state["step"]
    facts = progress(run_folder, base, until=step)
    if state.get("best_step") == step:
        facts["best"] = f"step {step}, {state['best_metric']} {state['best_value']:.4f}; the export is of it"
    chat = model_files.tokenizer.chat_template is not None
    with _open_model_weights(step_folder, settings) as weights:
        weights.match(shapes)
        expected, _ = streamed_logits(weights, config, prompt_ids(config))
        # A classification head is computed for every token here; the model's answer is that of the last one.
        if "lm_head.weight" not in shapes and "qa_outputs.weight" not in shapes:
            expected = expected[-1:]
        report = write_verified(
            target,
            ((name, weights.tensor(name)) for name in shapes),
            shapes,
            dtype=DTYPES[dtype],
            model_files=model_files,
            facts=card_facts(facts, run=run_folder, base=base, chat=chat, until=step),
            expected=expected,
            shard_bytes=shard_bytes,
        )
    about = {"architecture": model_class.__name__, "run": facts, "checkpoint": step_folder.name}
    write_export_report(target, report | about)
    return target


def _check_empty(folder: Path) -> Path:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"output_dir={folder} exists and is not empty; give another one, or remove it")
    return folder


def _settings(run_folder: Path) -> dict[str, Any]:
    """Return the values of the run's config.yaml; empty if it is not there."""
    path = run_folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings; restore the file that the run wrote, or remove it")
    return values  # type: ignore[return-value]


def _open_model_weights(step_folder: Path, settings: dict[str, Any]) -> StoredWeights:
    """Open a checkpoint's weights; those of LoRA adapters come merged into the weights that the run started from."""
    trained = CheckpointWeights(step_folder)
    if not any(is_adapter(name) for name in trained.names()):
        return trained
    base = settings.get("init_from")
    if base is None:
        config_file = step_folder.parent.parent / "config.yaml"
        raise UserError(f"{step_folder} holds LoRA adapters only, and {config_file} names no init_from")
    try:
        lora, precision = settings["lora"], DTYPES[settings["engine"]["precision"]]
        if settings.get("quantize", "none") != "none":
            precision = torch.float32  # no dtype gives the base of the training
        scale = adapter_scale(lora["rank"], lora["alpha"], lora.get("rslora", False))
        added = [AddedToken.parse(text) for text in settings["add_tokens"]]
        tokenizer = Tokenizer.choose(settings["tokenizer"], base)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        config_file = step_folder.parent.parent / "config.yaml"
        raise UserError(f"{config_file} lacks settings of the run ({error!r}); restore the one it wrote") from None
    # The base gets the rows of added tokens as the run gave them: they are frozen, so that no checkpoint holds them.
    _, mean_rows = tokenizer.with_added_tokens(added, GPTJConfig.from_pretrained(base).vocab_size)
    return MergedWeights(
        WithMeanRows(open_weights(base), mean_rows),
        trained,
        scale=scale,
        precision=precision,
    )
