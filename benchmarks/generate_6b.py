"""Measure seconds per token and peak memory of generating text with GPT-J 6B on this machine.

    python benchmarks/generate_6b.py /scratch/gptj_6b_random [--new-tokens 8] [--dtype bf16]

The first run writes the folder: random weights of the real shapes in bf16, 12.1 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.inference.text_generator import TextGenerator
from gptj_train.weights.hf_writer import write_weights

RESULT = Path(__file__).parent / "results" / "generate_6b.json"


def write_checkpoint(folder: Path) -> None:
    """Write GPT-J 6B's config and random weights, one tensor in memory at a time."""
    config = GPTJConfig(dtype="bfloat16")
    with torch.device("meta"):
        model = GPTJForCausalLM(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        # One random block repeated: drawing six billion numbers would take minutes and change no measurement.
        block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
        for name, shape in shapes.items():
            blocks = math.ceil(shape.numel() / len(block))
            tensor = block.repeat(blocks)[: shape.numel()].view(shape)
            is_norm = name.endswith(("ln_1.weight", "ln_f.weight"))
            yield name, tensor + 1.0 if is_norm else tensor

    folder.mkdir(parents=True)
    write_weights(folder, tensors(), shapes, dtype=torch.bfloat16)
    config.save_pretrained(folder, "GPTJForCausalLM")
    Tokenizer.train([Path(__file__).read_text()], 400).save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--dtype", choices=["bf16", "fp32"])
    given = parser.parse_args()
    if not given.folder.exists():
        write_checkpoint(given.folder)
    began = time.perf_counter()
    generator = TextGenerator(given.folder, given.dtype)
    loaded = time.perf_counter()
    prompt = torch.tensor([generator.tokenizer.encode("from pathlib import Path")], device=generator.device)
    moments = [loaded]
    # Without end tokens, so that random weights cannot end the text early.
    for _ in generator.model.stream(prompt, max_new_tokens=given.new_tokens, eos_token_id=[]):
        moments.append(time.perf_counter())
    seconds = [later - earlier for earlier, later in pairwise(moments)]
    found = {
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()}, device {generator.device}",
        "torch": torch.__version__,
        "dtype": str(generator.model.lm_head.weight.dtype),
        "parameters": sum(parameter.numel() for parameter in generator.model.parameters()),
        "load_seconds": round(loaded - began, 1),
        "first_token_seconds": round(seconds[0], 1),
        "seconds_per_token": round(statistics.median_high(seconds[1:]), 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
