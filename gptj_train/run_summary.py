"""The closing text of a run: results, files, and what to do next."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptj_train.counted import counted
from gptj_train.metrics_file import read_metrics, results_of

_FORGETTING = "eval_loss/forgetting"


def summary(output_dir: str, architecture: str, sample: str | None = None) -> str:
    """Return the closing text of a run: the results, the paths of its files, and what to do next."""
    lines = read_metrics(output_dir)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    done = "\nDone."
    if steps:
        first, last = steps[0], steps[-1]
        done += f" Training loss {_text(first['loss'])} -> {_text(last['loss'])} in {counted(len(steps), 'step')}."
        skipped = last["skipped_steps"]
        if skipped:
            done += f" {skipped} of them changed nothing: NaN or infinity in loss or gradients."
    text = [done]
    if evaluations:
        text += _held_out_results(evaluations[0], evaluations[-1])
    if sample is not None:
        indented = ["    " + line for line in sample.splitlines()]
        text.append("Sample from the export:\n\n" + "\n".join(indented) + "\n")
    text += [
        f"  model         {output_dir}/export   (Transformers loads it: {architecture}.from_pretrained)",
        *_adapter_line(output_dir),
        f"  report        {output_dir}/report.html",
        f"  metrics       {output_dir}/metrics.jsonl",
        f"  checkpoints   {output_dir}/checkpoints",
        "Next:",
        "  rerun the command with a larger max_steps=... to resume from the last checkpoint",
    ]
    if architecture == "GPTJForCausalLM":
        text.append(f'  python recipes/generate.py checkpoint={output_dir}/export prompt="..."')
    return "\n".join(text)


def _held_out_results(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
    """Return lines that compare the first and the last evaluation, and give the last losses by component."""
    changes, losses, forgetting = [], [], []
    for name, value in results_of(last).items():
        if "/" not in name:
            changes.append(f"{name} {_text(first.get(name))} -> {_text(value)}")
    # Not by results_of: a component's loss that is null (NaN) is shown as well.
    for name, value in last.items():
        if name == _FORGETTING:
            # What the model knew before: how far it rose is what matters.
            forgetting.append(f"Text from outside (data.forgetting): loss {_text(first.get(name))} -> {_text(value)}.")
        elif name.startswith("eval_loss/"):
            losses.append(f"{name.removeprefix('eval_loss/')} {_text(value)}")
    lines = ["Held-out: " + ", ".join(changes) + "."]
    if losses:
        lines.append(f"Held-out loss by component: {', '.join(losses)}.")
    return lines + forgetting


def _adapter_line(output_dir: str) -> list[str]:
    """Return the line about LoRA's adapter, with the number of parameters that were trained, if there is one."""
    folder = Path(output_dir) / "adapter"
    if not folder.is_dir():
        return []
    count = ""
    with contextlib.suppress(OSError, ValueError, KeyError):  # a fact less, if environment.json is damaged
        facts = json.loads((Path(output_dir) / "environment.json").read_text(encoding="utf-8"))
        trained, whole = facts["trained_parameters"], facts["parameters"]
        count = f"{trained:,} of {whole:,} parameters, {trained / whole:.2%}; "
    return [f"  adapter       {folder}   ({count}PEFT loads it on the base model)"]


def _text(value: float | None) -> str:
    return "nan" if value is None else f"{value:.3f}"
