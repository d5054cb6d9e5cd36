"""QLoRA as a user runs it: one command trains on a 4-bit base; the result is measured and generates in 4 and 8 bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.config import EvaluateConfig
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.export.from_checkpoint import export_checkpoint
from gptj_train.inference.evaluate_checkpoint import build_task, evaluate
from gptj_train.inference.text_generator import TextGenerator
from gptj_train.launch.command_line import compose

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
RHYME = "One for sorrow, two for joy, three for a girl, four for a boy, five for silver, six for gold. "


def run_recipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(ROOT / "recipes" / "clm.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps on a 4-bit base of random weights, with a word of its own."""
    folder = tmp_path_factory.mktemp("qlora")
    texts = [RHYME * (1 + number % 4) for number in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = Tokenizer.train(texts, 300)
    torch.manual_seed(4)
    base = GPTJForCausalLM(GPTJConfig(vocab_size=320, n_positions=32, n_embd=64, n_layer=2, n_head=2, rotary_dim=8))
    base.save_pretrained(folder / "base")
    tokenizer.save(folder / "base")
    done = run_recipe(
        "+config=qlora_quickstart",
        *(f"output_dir={folder / 'run'}", f"init_from={folder / 'base'}", f"data.cache_dir={folder / 'cache'}"),
        *(f"data.train={folder / 'text.jsonl'}", f"data.validation={folder / 'text.jsonl'}"),
        *("sequence_length=32", "max_steps=12", "optim.lr=0.02", "optim.warmup_steps=1", "sample_prompt='One '"),
        """add_tokens=["<|bird|> = One for"]""",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "base      nf4 in training" in done.stderr + done.stdout
    return folder / "run"


def test_it_learns_and_exports(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < 0.9 * losses[0]
    assert {"export", "adapter", "checkpoints"} <= {path.name for path in run.iterdir()}
    card = (run / "export" / "README.md").read_text()
    assert "adapters merged into the unquantized weights" in card
    report = json.loads((run / "export_report.json").read_text())
    assert 0 < report["logits"]["difference_of_quantized_base"] < 0.5


def test_a_checkpoint_exports_as_the_run_did(run: Path) -> None:
    export_checkpoint(run, run / "again", "bf16")
    again, first = (load_file(run / name / "model.safetensors") for name in ("again", "export"))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_evaluation_in_8_and_4_bits(run: Path) -> None:
    """Every quantity is near that of the stored weights, 8 bits nearer than 4, and none is equal."""
    settings = [f"checkpoint={run / 'export'}", f"data.validation={run.parent / 'text.jsonl'}", "dtype=fp32"]
    settings += [f"data.cache_dir={run.parent / 'cache'}"]
    losses = {}
    for kind in ("none", "int8", "nf4"):
        cfg = compose("evaluate", [*settings, f"quantize={kind}"], EvaluateConfig)
        metrics = evaluate(cfg.checkpoint, cfg.dtype, build_task(cfg), rank=0, world_size=1, quantize=cfg.quantize)
        losses[kind] = metrics["eval_loss"]
    gaps = {kind: abs(losses[kind] / losses["none"] - 1) for kind in ("int8", "nf4")}
    assert 0 < gaps["int8"] < gaps["nf4"] < 0.05


def test_text_in_4_bits(run: Path) -> None:
    generator = TextGenerator(run / "export", quantize="nf4")
    (text,) = generator.complete(["One for"], max_new_tokens=8, do_sample=False)
    assert text
