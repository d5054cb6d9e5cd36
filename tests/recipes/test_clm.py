"""The main job as a user runs it: on two ranks, from a copy of the recipe, resumed, then read by Transformers."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.export.from_checkpoint import export_checkpoint
from gptj_train.training.retention import newest_complete

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
KEYS = {"kind", "time", "epoch", "step", "loss", "lr", "grad_norm", "tokens", "target_tokens", "tokens_per_second"}
KEYS |= {"step_seconds", "memory_gib"}
KEYS |= {"skipped_steps", "loss_scale"}
TABLES = ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")
RHYME = "One for sorrow, two for joy, three for a girl, four for a boy, five for silver, six for gold. "


TINY = """# @package _global_
model: {n_layer: 2, n_embd: 32, rotary_dim: 4, vocab_size: 300, n_positions: 32}
data: {weights: {even: 3, odd: 1}}
sequence_length: 32
optim: {lr: 1.0e-2, warmup_steps: 1}
eval_every: 4
sample_prompt: "One "
"""


def train(corpus: Path, ranks: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of recipes/clm.py, with a preset of the user's own, in a folder outside of the repository."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if torch.cuda.device_count() < ranks:
        environment["DS_ACCELERATOR"] = "cpu"
    launcher = [sys.executable]  # plain python is one rank, and starts sooner than a launcher
    if ranks > 1:
        launcher += ["-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(ranks), "--master_port", port]
    arguments = ["my_recipe.py", "--config-dir", "presets", "+config=[quickstart,tiny]"]
    paths = {
        "output_dir": "run",
        "tokenizer": "tokenizer",
        "data.train": "train.jsonl",
        "data.validation": "validation.jsonl",
        "data.forgetting": "known.txt",
        "data.cache_dir": "cache",
    }
    given = [f"{key}={corpus / name}" for key, name in paths.items()]
    return subprocess.run(
        [*launcher, *arguments, *given, *overrides],
        cwd=corpus,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clm")
    texts = [RHYME * (1 + number % 4) for number in range(60)]
    for split, part in (("train", texts[:50]), ("validation", texts[50:])):
        records = [
            {"text": text, "meta": {"pile_set_name": "odd" if number % 2 else "even"}}
            for number, text in enumerate(part)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "known.txt").write_text("something else entirely, known before. " * 3)
    (folder / "tokenizer").mkdir()
    Tokenizer.train(texts, 300).save(folder / "tokenizer")
    shutil.copy(ROOT / "recipes" / "clm.py", folder / "my_recipe.py")
    (folder / "presets" / "config").mkdir(parents=True)
    (folder / "presets" / "config" / "tiny.yaml").write_text(TINY)
    return folder


@pytest.fixture(scope="module")
def runs(corpus: Path) -> list[subprocess.CompletedProcess[str]]:
    """A run of 12 steps on two ranks, the same resumed to 16, and resumed to 18 on one rank."""
    of_run = corpus / "first"
    done = [train(corpus, 2, "max_steps=12", "save_every=6")]
    # The run folder as the first command left it.
    shutil.copytree(corpus / "run", of_run)
    done += [train(corpus, 2, "max_steps=16", "save_every=6")]
    shutil.copytree(corpus / "run", corpus / "second")
    done += [train(corpus, 1, "max_steps=18")]
    return done


def test_trains_resumes_and_exports(corpus: Path, runs: list[subprocess.CompletedProcess[str]]) -> None:
    first, again, _ = runs
    assert first.returncode == 0, first.stdout + first.stderr
    run = corpus / "first"
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("config.yaml", "environment.json", "metrics.jsonl", "status.json", ".lock", "checkpoints", "export"),
        *("export_report.json", "report.html"),
    }
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    environment = json.loads((run / "environment.json").read_text())
    assert environment["ranks"] == environment["hosts"][0]["ranks"] == 2
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["command"].startswith("my_recipe.py --config-dir presets ")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_00000008", "step_00000012"}

    run = corpus / "second"
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming from" in again.stdout
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_00000012", "step_00000016"}

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 17))
    assert all(line.keys() == KEYS for line in steps)
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 4, 8, 12, 16]
    metrics = ("eval_loss", "perplexity", "bits_per_byte")
    of_components = {f"{metric}/{name}" for metric in metrics for name in ("even", "odd", "forgetting")}
    assert all(
        line.keys() == {"kind", "time", "epoch", "step", "tokens", *metrics, *of_components} for line in evaluations
    )
    assert evaluations[-1]["eval_loss/forgetting"] > evaluations[-1]["eval_loss"]
    report = (run / "report.html").read_text()
    for component in ("even", "odd", "forgetting"):
        assert f">{component}</h" in report
    epochs = next(line for line in first.stdout.splitlines() if line.startswith("epochs "))
    assert re.fullmatch(r"epochs +even \d+\.\d\d, odd \d+\.\d\d in 12 steps", epochs)
    assert evaluations[-1]["eval_loss"] < 0.6 * evaluations[0]["eval_loss"]

    # Nothing on stderr, and no line printed by two ranks.
    for done in (first, again):
        assert done.stderr == ""
        lines_of_rank = ("step ", "saved ", "data ", "batch ", "epochs ")
        printed = [line for line in done.stdout.splitlines() if line.startswith(lines_of_rank)]
        assert len(printed) == len(set(printed)) > 3
        assert "warning" not in done.stdout.lower()

    ids = torch.tensor([Tokenizer.load(run / "export").encode(RHYME)[:30]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    ours = GPTJForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-5
    assert transformers.AutoTokenizer.from_pretrained(run / "export").encode(RHYME)[:30] == ids[0].tolist()
    assert theirs.config.eos_token_id == 0
    stored = load_file(run / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_resumes_on_another_number_of_ranks(corpus: Path, runs: list[subprocess.CompletedProcess[str]]) -> None:
    """The checkpoints that it resumes from are of two ranks."""
    *_, done = runs
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming from {corpus}/run/checkpoints/step_00000016" in done.stdout
    lines = [json.loads(line) for line in (corpus / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == list(range(1, 19))
    assert losses[18] < 0.8 * losses[1]

    # A checkpoint is a model folder too.
    model = GPTJForCausalLM.from_pretrained(corpus / "run" / "checkpoints" / "step_00000018", dtype=torch.bfloat16)
    stored = load_file(corpus / "run" / "export" / "model.safetensors")
    assert all(torch.equal(parameter, stored[name]) for name, parameter in model.named_parameters())


@pytest.mark.usefixtures("runs")
def test_other_data_are_refused_on_resume(corpus: Path) -> None:
    done = train(corpus, 1, "max_steps=20", "seed=7")
    assert done.returncode == 2
    message = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(message) == 1
    assert "step 18 would see other data than the checkpoint expects: seed 0 -> 7; restore that, or" in message[0]
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def source(corpus: Path) -> Path:
    """An fp32 folder with more rows than its tokenizer has words."""
    config = GPTJConfig(vocab_size=310, n_positions=32, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    torch.manual_seed(5)
    GPTJForCausalLM(config).save_pretrained(corpus / "source")
    Tokenizer.load(corpus / "tokenizer").save(corpus / "source", 310)
    return corpus / "source"


def test_no_bit_of_fp32_weights_is_lost(corpus: Path, source: Path) -> None:
    """bf16, ZeRO-3, all offloaded, and not a single step."""
    done = train(corpus, 2, f"init_from={source}", "max_steps=0", "export_dtype=fp32", f"output_dir={corpus / 'zero'}")
    assert done.returncode == 0, done.stdout + done.stderr
    exported = corpus / "zero" / "export" / "model.safetensors"
    assert exported.read_bytes() == (source / "model.safetensors").read_bytes()
    lines = [json.loads(line) for line in (corpus / "zero" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0]


def test_adapters_and_a_new_word(corpus: Path, source: Path) -> None:
    run = corpus / "adapted"
    words = """add_tokens=["<|bird|> = One for"]"""
    settings = ["lora=adapters", "lora.rank=2", "engine.offload_optimizer=none", "max_steps=4", f"init_from={source}"]
    done = train(corpus, 2, f"output_dir={run}", words, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.name for path in run.iterdir()}
    assert {"export", "adapter", "export_report.json"} < names
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "export")
    row = len(Tokenizer.load(corpus / "tokenizer"))
    assert tokenizer.encode("<|bird|>") == [row]
    assert (len(tokenizer), tokenizer.pad_token_id) == (310, 309)
    stored, start = (load_file(folder / "model.safetensors") for folder in (run / "export", source))
    likes = [*tokenizer.encode("One"), *tokenizer.encode("for")]
    for name in TABLES:
        mean = start[name][likes].mean(dim=0)
        assert torch.equal(stored[name][row], mean.bfloat16()), name
        assert torch.equal(stored[name][row + 1 :], start[name][row + 1 :].bfloat16()), name
    changed = {name for name in stored if not torch.equal(stored[name], start[name].bfloat16())}
    assert all(".attn." in name or ".mlp." in name for name in changed - set(TABLES))
    assert len(changed) > 6
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["base_model_name_or_path"]) == (2, str(source))
    assert f"adapter       {run}/adapter" in done.stdout
    assert 'library_name: "peft"' in (run / "adapter" / "README.md").read_text()
    assert transformers.AutoTokenizer.from_pretrained(run / "adapter").encode("<|bird|>") == [row]
    (checkpoint,) = (run / "checkpoints").iterdir()
    with pytest.raises(UserError, match=rf"adapters only; .* recipes/export\.py run={checkpoint} "):
        GPTJForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("run", ["run", "adapted"])
def test_a_checkpoint_exports_as_the_run_did(corpus: Path, run: str) -> None:
    """After the tests above. One of them by the recipe, the other by the function that the recipe calls."""
    if run == "run":
        command = [sys.executable, "recipes/export.py", f"run={corpus / run}", f"output_dir={corpus / run / 'again'}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        export_checkpoint(corpus / run, corpus / run / "again", "bf16")
    again, first = (corpus / run / name for name in ("again", "export"))
    assert {file.name for file in again.iterdir()} == {file.name for file in first.iterdir()}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (again / name).read_text() == (first / name).read_text()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (again, first))
    for name, tensor in theirs.items():
        if run == "run":
            assert torch.equal(ours[name], tensor), name
        else:  # the products are added up in another order
            assert (ours[name].float() - tensor.float()).abs().max() <= 1e-2 * tensor.float().abs().max(), name
    report = json.loads((corpus / run / "again_report.json").read_text())
    assert "checkpoint" not in json.loads((corpus / run / "export_report.json").read_text())
    assert report["checkpoint"] == max(path.name for path in (corpus / run / "checkpoints").iterdir())
    assert report["logits"]["relative_difference"] < 0.02


def test_what_cannot_be_exported(corpus: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoints/step_\.\.\. in it; give the output_dir of a run"):
        export_checkpoint(corpus / "tokenizer", None, "bf16")


@pytest.mark.usefixtures("runs")
def test_an_export_overwrites_no_other_folder(corpus: Path) -> None:
    """In the training recipes output_dir is the run folder; here it would be replaced by the export."""
    with pytest.raises(UserError, match=rf"output_dir={corpus / 'run'} exists and is not empty"):
        export_checkpoint(corpus / "run", corpus / "run", "bf16")
    assert (corpus / "run" / "checkpoints").is_dir()
    copied = corpus / "copied"
    shutil.copytree(newest_complete(corpus / "run"), copied)
    with pytest.raises(UserError, match="is not in a run's checkpoints folder; give output_dir"):
        export_checkpoint(copied, None, "bf16")
    assert export_checkpoint(copied, corpus / "of_copied", "bf16") == corpus / "of_copied"
