"""The closing text of a run: results, files, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptj_train.metrics_file import read_metrics, results_of


def summary(output_dir: str, architecture: str, sample: str | None = None) -> str:
    """Return the closing text of a run: the results, the paths of its files, and what to do next."""
    lines = read_metrics(output_dir)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    done = "\nDone."
    if steps:
        first, last = steps[0], steps[-1]
        done += f" Training loss {_text(first['loss'])} -> {_text(last['loss'])} in {len(steps)} steps."
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
        f"  report        {output_dir}/report.html",
        f"  metrics       {output_dir}/metrics.jsonl",
        f"  checkpoints   {output_dir}/checkpoints",
        "Next:",
        "  rerun the command with a larger max_steps=... to resume from the last checkpoint",
    ]
    if (Path(output_dir) / "adapter").is_dir():
        text.insert(-2, f"  adapter       {output_dir}/adapter   (PEFT loads it on the base model)")
    if architecture == "GPTJForCausalLM":
        text.append(f'  python recipes/generate.py checkpoint={output_dir}/export prompt="..."')
    return "\n".join(text)


def _held_out_results(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
    """Return lines that compare the first and the last evaluation, and give the last losses by component."""
    changes, losses = [], []
    for name, value in results_of(last).items():
        if "/" not in name:
            changes.append(f"{name} {_text(first.get(name))} -> {_text(value)}")
    # Not by results_of: a component's loss that is null (NaN) is shown as well.
    for name, value in last.items():
        if name.startswith("eval_loss/"):
            losses.append(f"{name.removeprefix('eval_loss/')} {_text(value)}")
    lines = ["Held-out: " + ", ".join(changes) + "."]
    if losses:
        lines.append(f"Held-out loss by component: {', '.join(losses)}.")
    return lines


def _text(value: float | None) -> str:
    return "nan" if value is None else f"{value:.3f}"
