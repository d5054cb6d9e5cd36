"""The lm-eval harness gives the same results for our model as for Transformers' through its own adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.inference.lm_eval import HarnessModel, run_tasks
from gptj_train.inference.text_generator import TextGenerator

ROOT = Path(__file__).parents[2]
TEXTS = [f"{number} cats and {number} dogs are {2 * number} animals, " * (1 + number % 5) for number in range(9)]
KINDS = {
    "choice": "multiple_choice\ndoc_to_choice: ['cats', ' dogs are here', 'é']\ndoc_to_target: label",
    "rolling": "loglikelihood_rolling\ndoc_to_target: '{{text}}'",
    "until": "generate_until\ndoc_to_target: cat\ngeneration_kwargs: {until: ['a'], max_gen_toks: 12}",
}
METRICS = {"choice": "acc", "rolling": "byte_perplexity", "until": "exact_match"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a task of each kind with its data beside it."""
    path = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(TEXTS, 300)
    shape = {"vocab_size": 300, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}
    model = GPTJForCausalLM(GPTJConfig(**shape, initializer_range=0.2, eos_token_id=tokenizer.eos_id))
    model.save_pretrained(path / "model")
    tokenizer.save(path / "model")
    rows = [json.dumps({"text": text, "label": number % 3}) for number, text in enumerate(TEXTS)]
    (path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    for kind, more in KINDS.items():
        (path / f"{kind}.yaml").write_text(
            f"task: {kind}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {path}/rows.jsonl}}}}\n"
            f"test_split: test\ndoc_to_text: '{'' if kind == 'rolling' else '{{text}}'}'\noutput_type: {more}\n"
            f"metric_list: [{{metric: {METRICS[kind]}}}]\n"
        )
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_harness_own_adapter(folder: Path, kind: str) -> None:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    ours = HarnessModel(TextGenerator(folder / "model"), batch_size=4)
    theirs = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=3)
    found = [
        lm_eval.simple_evaluate(model, tasks=[kind], task_manager=manager, bootstrap_iters=0)
        for model in (ours, theirs)
    ]
    mine, other = ([sample["filtered_resps"] for sample in one["samples"][kind]] for one in found)
    assert len(mine) == len(TEXTS)
    if kind == "until":
        assert mine == other
        assert any(text for (text,) in mine)
    else:
        flat = [
            torch.tensor([float(number) for row in rows for number in torch.tensor(row).flatten()])
            for rows in (mine, other)
        ]
        torch.testing.assert_close(*flat, rtol=1e-4, atol=1e-4)
    assert found[0]["results"][kind][f"{METRICS[kind]},none"] == pytest.approx(
        found[1]["results"][kind][f"{METRICS[kind]},none"], rel=1e-4
    )


def test_the_recipe(folder: Path, tmp_path: Path) -> None:
    arguments = [f"checkpoint={folder}/model", "tasks=[choice]", f"include_path={folder}", "limit=5"]
    command = [sys.executable, "recipes/harness.py", *arguments, f"output_dir={tmp_path}/out"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "|choice|" in done.stdout.replace(" ", "")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert 0 <= results["results"]["choice"]["acc,none"] <= 1
    assert results["n-samples"]["choice"]["effective"] == 5


def test_an_unknown_task(folder: Path) -> None:
    with pytest.raises(UserError, match="tasks: the harness has no nothing; add your own folder"):
        run_tasks(
            TextGenerator(folder / "model"),
            tasks=["nothing", "choice"],
            include_path=str(folder),
            num_fewshot=None,
            limit=1,
            batch_size=1,
            output_dir=None,
        )
