"""Compare our generate with that of Transformers' GPT-J on the same weights: seconds a token, and equal texts.

    python benchmarks/generate_vs_transformers.py

The model has two layers of GPT-J 6B and its head, in bf16. Both sides share the memory of the weights and decode
greedily in turns (A B A B ...) in one process; each uses its own model, attention, cache and loop unchanged. On a CPU
Transformers has only eager attention for GPT-J. A result is written only if both give the same ids in fp32: in bf16
two of 50,400 random logits are so often equal but for rounding that texts part sooner or later.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from provenance import provenance

from gptj_train import GPTJConfig, GPTJForCausalLM

RESULTS = Path(__file__).parent / "results"
SIDES = ("gptj_train", "transformers")
SHAPE: dict[str, Any] = {
    **{"n_layer": 2, "n_embd": 4096, "n_head": 16},
    **{"n_positions": 2048, "rotary_dim": 64, "vocab_size": 50400},
}
PAD = 50256


@dataclass(frozen=True)
class Cell:
    """What is generated: prompts of these lengths, padded on the left, and so many new tokens of each."""

    name: str
    lengths: tuple[int, ...]
    new_tokens: int
    beams: int = 1


CELLS = [
    Cell("1 prompt of 32", (32,), 24),
    Cell("1 prompt of 256", (256,), 24),
    Cell("4 prompts of 8 to 32, padded", (32, 8, 20, 12), 16),
    Cell("1 prompt of 32, 4 beams", (32,), 16, beams=4),
]


class Clock:
    """A streamer that notes when each token comes."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, _: Any) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        pass


def build() -> dict[str, Any]:
    """Return both models in fp32, with the same weights in the same memory."""
    with torch.device("meta"):
        ours = GPTJForCausalLM(GPTJConfig(**SHAPE)).eval()
        theirs = transformers.GPTJForCausalLM(transformers.GPTJConfig(**SHAPE)).eval()
    # One random block repeated: drawing 800 million numbers would take longer than the benchmark. Its length is prime,
    # so that no two rows of a matrix are equal.
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) * 0.02
    weights = {}
    for name, parameter in ours.named_parameters():
        blocks = math.ceil(parameter.numel() / len(block))
        tensor = block.repeat(blocks)[: parameter.numel()].view(parameter.shape)
        weights[name] = tensor + 1 if name.endswith(("ln_1.weight", "ln_f.weight")) else tensor
    ours.load_state_dict(weights, assign=True)
    # Buffers of the meta device are not in the state dict.
    positions = transformers.models.gptj.modeling_gptj.create_sinusoidal_positions
    for block in theirs.transformer.h:
        block.attn.embed_positions = positions(SHAPE["n_positions"], SHAPE["rotary_dim"])
    models = {"gptj_train": ours, "transformers": theirs}
    share_weights(models)
    return models


def share_weights(models: dict[str, Any]) -> None:
    models["transformers"].load_state_dict(models["gptj_train"].state_dict(), assign=True)


def check_equal_texts(models: dict[str, Any], cells: list[Cell]) -> None:
    """End the benchmark unless both sides give the same ids in every cell."""
    for cell in cells:
        ours, theirs = (generate(models[side], cell)["ids"] for side in SIDES)
        if not torch.equal(ours, theirs):
            sys.exit(f"{cell.name}: the texts differ; nothing is written")


def prompts(cell: Cell) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (B, T) of random prompts."""
    generator = torch.Generator().manual_seed(1)
    longest = max(cell.lengths)
    ids = torch.full((len(cell.lengths), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(cell.lengths):
        ids[row, longest - length :] = torch.randint(1000, (length,), generator=generator)
        mask[row, longest - length :] = 1
    return ids, mask


def generate(model: Any, cell: Cell) -> dict[str, Any]:
    """Generate once and return the ids, the seconds in all, and those of each token after the first."""
    ids, mask = prompts(cell)
    clock = Clock() if cell.beams == 1 else None
    began = time.perf_counter()
    # No end token, so that both always generate all tokens.
    text = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=cell.new_tokens,
        num_beams=cell.beams,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
        streamer=clock,
    )
    seconds = time.perf_counter() - began
    # The first put is the prompt, the second the token of the prefill.
    steps = [] if clock is None else [later - earlier for earlier, later in pairwise(clock.moments[1:])]
    return {"ids": text, "seconds": seconds, "steps": steps}


def measure(models: dict[str, Any], cell: Cell, repeats: int) -> dict[str, Any]:
    """Run both sides in turns and compare them."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for turn in range(repeats + 1):
        for side in SIDES:
            found = generate(models[side], cell)
            # The first turn warms up caches and kernels.
            if turn:
                runs[side].append(found)
    row: dict[str, Any] = {"cell": cell.name, "new_tokens": cell.new_tokens}
    for side in SIDES:
        steps = [step for found in runs[side] for step in found["steps"]]
        row[side] = {
            "seconds": statistics.median(found["seconds"] for found in runs[side]),
            "step_ms": 1000 * statistics.median(steps) if steps else None,
            "of_each_run": [found["seconds"] for found in runs[side]],
        }
    ours, theirs = (row[side]["of_each_run"] for side in SIDES)
    row["ratio_of_each_turn"] = [their / our for our, their in zip(ours, theirs, strict=True)]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| what | new tokens | gptj_train, s (ms a token) | transformers, s (ms a token) | transformers / gptj_train |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for side in SIDES:
            step = row[side]["step_ms"]
            cells.append(f"{row[side]['seconds']:.2f}" + ("" if step is None else f" ({step:.1f})"))
        turns = row["ratio_of_each_turn"]
        ratio = f"**{statistics.median(turns):.2f}** ({min(turns):.2f}-{max(turns):.2f} by turn)"
        lines.append(f"| {row['cell']} | {row['new_tokens']} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns, after one to warm up")
    parser.add_argument("--cells", type=int, default=len(CELLS), help="measure only the first so many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cells = CELLS[: given.cells]
    models = build()
    check_equal_texts(models, cells)
    models["gptj_train"].bfloat16()
    share_weights(models)
    rows = []
    for cell in cells:
        rows.append(measure(models, cell, given.repeats))
        print(table(rows[-1:]), file=sys.stderr, flush=True)
    command = " ".join(["python benchmarks/generate_vs_transformers.py", *sys.argv[1:]])
    text = (
        "# Our generate and that of Transformers' GPT-J\n\n"
        f"`{command}`: {SHAPE['n_layer']} layers of {SHAPE['n_embd']}, "
        f"{SHAPE['n_head']} heads, vocabulary {SHAPE['vocab_size']}, bf16, greedy; equal ids in fp32. "
        f"Medians of {given.repeats} turns.\n\n"
        f"{given.threads} threads on {provenance(('torch', 'transformers'))}.\n\n"
        f"{table(rows)}\n"
    )
    given.results.mkdir(parents=True, exist_ok=True)
    (given.results / "generate_vs_transformers.md").write_text(text)
    (given.results / "generate_vs_transformers.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
