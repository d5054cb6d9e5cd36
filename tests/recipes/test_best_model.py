"""A run that over-fits: the best checkpoint is kept and exported, patience ends it, and resuming changes nothing."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptj_train import GPTJForCausalLM
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.export.from_checkpoint import export_checkpoint
from gptj_train.weights.checkpoint_weights import CheckpointWeights

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
RHYME = "One for sorrow, two for joy, three for a girl, four for a boy, five for silver, six for gold. "
TINY = """
    model.n_layer=1 model.n_embd=32 model.n_head=4 model.rotary_dim=4 model.vocab_size=300 model.n_positions=32
    sequence_length=32 sample_prompt=null eval_every=4 optim.lr=2e-2
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rhyme to learn by heart, and its words in other orders, which every step after the first few makes worse."""
    folder = tmp_path_factory.mktemp("best")
    draw = random.Random(0)
    words = RHYME.split()
    texts = [RHYME * (1 + number % 4) for number in range(30)]
    held_out = [" ".join(draw.sample(words, len(words))) for _ in range(10)]
    for split, part in (("train", texts), ("validation", held_out)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    Tokenizer.train(texts + held_out, 300).save(folder / "tokenizer")
    return folder


def train(corpus: Path, name: str, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    paths = {"tokenizer": "tokenizer", "data.train": "train.jsonl", "data.validation": "validation.jsonl"}
    given = [f"{key}={corpus / file}" for key, file in paths.items()]
    command = [sys.executable]  # plain python is one rank
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command += ["-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(ranks), "--master_port", port]
    command += ["recipes/clm.py", "+config=quickstart", f"output_dir={corpus / name}", f"data.cache_dir={corpus}/cache"]
    return subprocess.run(
        [*command, *given, *TINY.split(), *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def lines_of(run: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def manifest_of(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / f"step_{step:08}" / "manifest.json").read_text())


PATIENT = ("max_steps=24", "save_every=12", "patience=3", "keep_checkpoints=2")


@pytest.fixture(scope="module")
def run(corpus: Path) -> tuple[Path, str]:
    """A run of 24 steps that its patience ends; its folder, and what it printed."""
    done = train(corpus, "run", *PATIENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return corpus / "run", done.stdout


def test_the_best_is_kept_named_and_exported(run: tuple[Path, str]) -> None:
    folder, printed = run
    losses = lines_of(folder, "eval_loss")
    assert list(losses) == [0, 4, 8, 12, 16, 20]
    assert min(losses, key=losses.__getitem__) == 8
    # The newest two, and the best.
    assert sorted(path.name[-2:] for path in (folder / "checkpoints").iterdir()) == ["08", "12", "20"]

    model = GPTJForCausalLM.from_pretrained(folder / "checkpoints" / "step_00000008", dtype=torch.bfloat16)
    stored = load_file(folder / "export" / "model.safetensors")
    assert all(torch.equal(parameter, stored[name]) for name, parameter in model.named_parameters())

    best = f"step 8, eval_loss {losses[8]:.4f}; the export is of it"
    assert f"\nbest      {best}\n" in printed
    assert f"\nBest: {best}.\n" in printed
    assert best in (folder / "report.html").read_text()
    card = (folder / "export" / "README.md").read_text()
    assert f"| best | {best} |" in card
    # The results in the card are those of the exported model, not of the last step.
    assert f"| eval loss | {losses[8]:.4f} |" in card
    assert "| training | 8 steps, " in card
    assert json.loads((folder / "export_report.json").read_text())["run"]["best"] == best
    ended = f"{losses[8]:.3f} at step 8 -> {losses[20]:.3f}"
    assert f"Note: eval_loss ended above its best, {ended}: the model has begun" in printed


def test_patience_ends_the_run_saved_and_done(run: tuple[Path, str]) -> None:
    folder, printed = run
    reason = "patience=3: no better eval_loss in 3 evaluations since step 8"
    assert f"{reason}; ended after step 20 of 24\n" in printed
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["reason"], status["step"]) == ("done", reason, 20)
    assert f"Ended early. {reason}." in printed
    assert "rerun the command with a larger patience=... to resume" in printed


def test_a_resumed_run_counts_and_ends_as_the_undisturbed_one(corpus: Path, run: tuple[Path, str]) -> None:
    """From step 12, when one evaluation had been no better: two more must end it, not three."""
    folder, _ = run
    for step in (8, 12):
        name = f"step_{step:08}"
        shutil.copytree(folder / "checkpoints" / name, corpus / "resumed" / "checkpoints" / name)
    done = train(corpus, "resumed", *PATIENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ended after step 20 of 24\n" in done.stdout
    first, again = manifest_of(folder, 20), manifest_of(corpus / "resumed", 20)
    assert again["state"] == first["state"]
    assert first["state"]["best_step"] == 8
    assert first["state"]["evaluations_since_best"] == 3
    assert again["files"] == first["files"]  # hashes of weights and moments: equal to the last bit
    exports = [(path / "export" / "model.safetensors").read_bytes() for path in (folder, corpus / "resumed")]
    assert exports[0] == exports[1]


def test_the_export_recipe_takes_the_best_too(run: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = run
    again = export_checkpoint(folder, tmp_path / "again", "bf16")
    assert (again / "model.safetensors").read_bytes() == (folder / "export" / "model.safetensors").read_bytes()
    assert "the export is of it" in (again / "README.md").read_text()


def test_extended_runs_have_the_learning_rates_they_announce(corpus: Path, run: tuple[Path, str]) -> None:
    """After step 20 of 24, to 30 steps in three ways. The last rate of the old schedule is 2e-3."""
    folder, _ = run
    before = lines_of(folder, "lr")
    rates = {}
    for extend in ("stretch", "constant", "rewarm"):
        name = f"to_30_{extend}"
        shutil.copytree(folder, corpus / name)
        done = train(corpus, name, "max_steps=30", f"extend={extend}", "optim.warmup_steps=1", "eval_every=0")
        assert done.returncode == 0, done.stdout + done.stderr
        rates[extend] = lines_of(corpus / name, "lr")
        assert {step: rate for step, rate in rates[extend].items() if step <= 20} == before
        note = [line for line in done.stdout.splitlines() if line.startswith("another max_steps changes")]
        if extend == "stretch":
            # A cosine from the end of the warm-up, step 1, to a tenth at the last step.
            shares = [(1 + math.cos(math.pi * 19 / length)) / 2 for length in (24 - 2, 30 - 2)]
            old, new = (2e-2 * (0.1 + 0.9 * share) for share in shares)
            assert rates[extend][21] == pytest.approx(new)
            assert note == [
                f"another max_steps changes the schedule (extend=stretch): the learning rate of step 21 is {new:.2e}, "
                f"it was {old:.2e}; extend=constant keeps the final rate, extend=rewarm warms up and decays once more"
            ]
        else:
            assert note == []  # the old schedule still has four steps
    assert rates["stretch"][30] == pytest.approx(2e-3)
    for extend in ("constant", "rewarm"):
        assert rates[extend][24] == pytest.approx(2e-3)
    assert [rates["constant"][step] for step in range(25, 31)] == pytest.approx([2e-3] * 6)
    # A warm-up of one step, and a cosine over the others.
    assert rates["rewarm"][25] == pytest.approx(2e-2)
    assert rates["rewarm"][30] == pytest.approx(2e-3)
    assert list(rates["rewarm"].values())[24:] == sorted(list(rates["rewarm"].values())[24:], reverse=True)


def test_epochs_and_export_of_last(corpus: Path) -> None:
    done = train(corpus, "epochs", "epochs=1.5", "export_of=last", "save_every=0", "optim.lr=4e-2")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = corpus / "epochs"
    steps = lines_of(folder, "epoch")
    last = max(steps)
    # 62 windows in batches of 8: 11.6 steps.
    assert last == 12
    assert steps[last] == pytest.approx(12 * 8 / 62)
    assert "\nepochs    1.55 in 12 steps\n" in done.stdout
    assert "max_steps: null\nepochs: 1.5\n" in (folder / "config.yaml").read_text()
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert checkpoint.name == "step_00000012"
    losses = lines_of(folder, "eval_loss")
    best = min((step for step in losses if step), key=losses.__getitem__)
    which = "it" if best == 12 else "step 12, the last"
    assert f"\nBest: step {best}, eval_loss {losses[best]:.4f}; the export is of {which}.\n" in done.stdout
    again = train(corpus, "epochs", "epochs=1.5", "export_of=last", "save_every=0", "optim.lr=4e-2")
    assert again.returncode == 0
    assert again.stdout.startswith("nothing left to do: ")


def test_adapters_of_the_best_step_are_exported_on_two_ranks(corpus: Path, run: tuple[Path, str]) -> None:
    base, _ = run
    lora = ["lora=adapters", "lora.rank=8", "engine.offload_optimizer=none", f"init_from={base}/export"]
    done = train(corpus, "lora", *lora, "tokenizer=null", "max_steps=12", "save_every=0", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = corpus / "lora"
    losses = lines_of(folder, "eval_loss")
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert best < 12, losses
    assert f"Best: step {best}, eval_loss {losses[best]:.4f}; the export is of it." in done.stdout
    exported = load_file(folder / "adapter" / "adapter_model.safetensors")
    differs = 0
    for name, tensor in exported.items():
        own = name.removeprefix("base_model.model.")
        of_best, of_last = (
            CheckpointWeights(folder / "checkpoints" / f"step_{step:08}").tensor(own) for step in (best, 12)
        )
        assert torch.equal(tensor, of_best), own
        differs += not torch.equal(of_best, of_last)
    assert differs > 0
    merged = load_file(folder / "export" / "model.safetensors")
    again = export_checkpoint(folder, folder / "again", "bf16")
    for name, tensor in load_file(again / "model.safetensors").items():
        # The products are added up in another order.
        assert (merged[name].float() - tensor.float()).abs().max() <= 1e-2 * tensor.float().abs().max(), name
