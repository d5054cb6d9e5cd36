"""LoRA through the engine: trained, frozen and exported weights, on every stage and place of offload."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import reference
import torch
import transformers
from ranks import NOT_OFFLOADED, ON_HOST, Results, job, launch
from safetensors.torch import load_file
from torch import Tensor
from toy import VOCAB, optim_config, toy_config

from gptj_train import GPTJForCausalLM

pytestmark = pytest.mark.distributed

STEPS = 6
LORA = {"rank": 4}  # of q_proj and fc_out, alpha 8: worker.py
PLACES = {
    **{f"stage {stage}": {"stage": stage} | NOT_OFFLOADED for stage in range(4)},
    **{f"stage {stage} cpu": {"stage": stage} | ON_HOST for stage in (2, 3)},
    "stage 3 both": {},
    "stage 3 weights on the host": {"offload_optimizer": "none", "offload_parameters": "cpu"},
    "fp32": {"precision": "fp32"},
}
MEAN_ROWS = {"5": [1, 2, 3], "90": [7]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(2)
    GPTJForCausalLM(toy_config()).save_pretrained(folder / "base")
    common = {"micro": 1, "steps": STEPS, "max_steps": STEPS, "init_from": str(folder / "base"), "lora": LORA}
    jobs = [job(name, engine=engine, export=["fp32"], **common) for name, engine in PLACES.items()]
    jobs += [
        job("first half", run="interrupted", save=True, **(common | {"steps": 3})),
        job("second half", run="interrupted", **common),
        job("before", engine=PLACES["fp32"], **(common | {"steps": 0})),
        job("new rows", init_from=str(folder / "base"), steps=0, mean_rows=MEAN_ROWS),
        job("new rows, adapted", **(common | {"steps": 0}), mean_rows=MEAN_ROWS),
    ]
    launch(2, folder, jobs)
    return Results(folder)


def base(runs: Results) -> dict[str, Tensor]:
    return load_file(runs.folder / "base" / "model.safetensors")


def is_adapter(name: str) -> bool:
    return "lora_" in name


@pytest.mark.parametrize("name", PLACES)
def test_the_base_stays(runs: Results, name: str) -> None:
    """Frozen in low precision; only the adapters change, and all of them do."""
    weights = runs.weights(name)
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    for parameter, tensor in base(runs).items():
        assert torch.equal(weights[parameter], tensor.to(dtype).float()), parameter
    adapters = {parameter: tensor for parameter, tensor in weights.items() if is_adapter(parameter)}
    assert len(adapters) == 2 * 2 * 2
    assert all(tensor.abs().max() > 0 for tensor in adapters.values())


@pytest.mark.parametrize("name", PLACES)
def test_every_place_trains_alike(runs: Results, name: str) -> None:
    """Losses to 2e-3 as with all weights."""
    losses = runs.column(name, "loss")
    assert losses == pytest.approx(runs.column("fp32", "loss"), rel=2e-3)
    norms = runs.column(name, "grad_norm")
    assert norms == pytest.approx(runs.column("fp32", "grad_norm"), rel=5e-2)


def test_fp32_follows_peft_in_a_plain_loop(runs: Results) -> None:
    """The oracle: PEFT's own model from our first adapters, AdamW, one process, the same batches."""
    model = transformers.AutoModelForCausalLM.from_pretrained(runs.folder / "base", dtype=torch.float32)
    start = runs.weights("before")  # the seed's adapters
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "fc_out"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    named = {f"base_model.model.{name}": tensor for name, tensor in start.items() if is_adapter(name)}
    peft.set_peft_model_state_dict(adapted, named)
    losses, norms = reference.train_adapters(adapted, STEPS)
    assert runs.column("fp32", "loss") == pytest.approx(losses, rel=1e-5)
    assert runs.column("fp32", "grad_norm") == pytest.approx(norms, rel=1e-4)
    weights = runs.weights("fp32")
    for name, tensor in peft.get_peft_model_state_dict(adapted).items():
        apart = (weights[name.removeprefix("base_model.model.")] - tensor).abs().max()
        assert apart < 0.02 * optim_config().lr, name


@pytest.mark.parametrize("name", PLACES)
def test_the_export_is_base_plus_product(runs: Results, name: str) -> None:
    export = runs.folder / name / "export_fp32"
    merged, weights = load_file(export / "model.safetensors"), runs.weights(name)
    assert merged.keys() == base(runs).keys()
    for parameter, tensor in merged.items():
        module = parameter.removesuffix(".weight")
        expected = weights[parameter]
        if f"{module}.lora_A.weight" in weights:
            product = weights[f"{module}.lora_B.weight"].double() @ weights[f"{module}.lora_A.weight"].double()
            expected = (expected.double() + 2.0 * product).float()
        assert (tensor - expected).abs().max() <= 1e-7 * max(1.0, expected.abs().max().item()), parameter


@pytest.mark.parametrize("name", ["fp32", "stage 3 both"])
def test_peft_loads_the_adapter(runs: Results, name: str) -> None:
    adapter = runs.folder / name / "adapter"
    names = {file.name for file in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= names
    model = transformers.AutoModelForCausalLM.from_pretrained(runs.folder / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, adapter)
    ids = torch.randint(VOCAB, (2, 13))
    merged = GPTJForCausalLM.from_pretrained(runs.folder / name / "export_fp32")
    # Of bf16 runs the merged base is the rounded one that was trained with.
    gap = (merged(ids).logits - theirs(ids).logits).abs().max()
    assert gap < (1e-5 if name == "fp32" else 2e-2)


def test_resumed_equals_straight_bit_for_bit(runs: Results) -> None:
    assert runs.column("first half", "loss") + runs.column("second half", "loss") == runs.column("stage 3 both", "loss")
    straight, resumed = runs.weights("stage 3 both"), runs.weights("second half")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


def test_a_checkpoint_holds_the_adapters_alone(runs: Results) -> None:
    (step,) = (runs.folder / "interrupted" / "checkpoints").iterdir()
    manifest = json.loads((step / "manifest.json").read_text())
    assert len(manifest["parameters"]) == 8
    assert all(map(is_adapter, manifest["parameters"]))
    assert sum(file.stat().st_size for file in step.glob("*.safetensors")) < 50_000


@pytest.mark.parametrize("name", ["new rows", "new rows, adapted"])
def test_new_rows_are_means(runs: Results, name: str) -> None:
    """In fp32 in the masters; in low precision where they are frozen. Nothing else changes."""
    weights = runs.weights(name)
    for parameter, tensor in base(runs).items():
        expected = tensor.clone()
        if parameter in ("transformer.wte.weight", "lm_head.weight", "lm_head.bias"):
            for row, others in MEAN_ROWS.items():
                expected[int(row)] = tensor[others].mean(dim=0)
        expected = expected.bfloat16().float() if "adapted" in name else expected
        assert (weights[parameter] - expected).abs().max() <= 1e-7, parameter


def test_the_report_of_the_export(runs: Results) -> None:
    report = json.loads((Path(runs.folder) / "stage 3 both" / "export_fp32_report.json").read_text())
    assert report["logits"]["relative_difference"] < 0.02 < report["logits"]["limit"]
    exact = json.loads((Path(runs.folder) / "fp32" / "export_fp32_report.json").read_text())
    assert exact["logits"]["relative_difference"] < 1e-5 < exact["logits"]["limit"] == 1e-3
