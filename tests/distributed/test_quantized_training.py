"""QLoRA through the engine: stages 0 to 2, one rank or two, resuming, checkpoints, export and adapter folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import reference
import torch
import transformers
from ranks import NOT_OFFLOADED, Results, job, launch
from safetensors.torch import load_file
from toy import VOCAB, toy_config

from gptj_train import GPTJForCausalLM

pytestmark = pytest.mark.distributed

STEPS = 6
WIDTH = 64
LORA = {"rank": 4, "targets": "all-linear"}  # alpha 8: worker.py
FP32 = {"stage": 2, "precision": "fp32"} | NOT_OFFLOADED
PLACES = {
    **{f"stage {stage}": {"stage": stage} | NOT_OFFLOADED for stage in range(3)},
    "stage 2 cpu": {"stage": 2, "offload_optimizer": "cpu", "offload_parameters": "none"},
    "fp32": FP32,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("qlora")
    torch.manual_seed(2)
    base = GPTJForCausalLM(toy_config(width=WIDTH))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    base.save_pretrained(folder / "base")
    common = {
        "micro": 1,
        "steps": STEPS,
        "max_steps": STEPS,
        "width": WIDTH,
        "init_from": str(folder / "base"),
        "lora": LORA,
        "quantize": "nf4",
    }
    continued = LORA | {"init_from": f"{folder}/fp32/adapter"}
    plain = {"engine": PLACES["stage 2"]}
    jobs = [job(name, engine=engine, export=["fp32"], **common) for name, engine in PLACES.items()]
    jobs += [
        job("int8", engine=FP32, **(common | {"quantize": "int8"})),
        job("not quantized", engine=FP32, **(common | {"quantize": "none"})),
        job("first half", run="interrupted", save=True, **plain, **(common | {"steps": 3})),
        job("second half", run="interrupted", **plain, **common),
        job("before", engine=FP32, **(common | {"steps": 0})),
        job("plain before", engine=FP32, **(common | {"steps": 0, "quantize": "none"})),
        job("new rows", engine=FP32, export=["fp32"], mean_rows={"5": [1, 2]}, **(common | {"steps": 0})),
        job("faster B", engine=FP32, optim={"lora_lr_ratio": 4.0}, **common),
        job("continued", engine=FP32, **(common | {"steps": 0, "lora": continued})),
    ]
    launch(2, folder, jobs)
    launch(1, folder, [job("one rank", engine=FP32, **common)])
    return Results(folder)


@pytest.mark.parametrize("name", PLACES)
def test_every_stage_trains_alike(runs: Results, name: str) -> None:
    assert runs.column(name, "loss") == pytest.approx(runs.column("fp32", "loss"), rel=5e-3)


def test_one_rank_trains_as_two(runs: Results) -> None:
    assert runs.column("one rank", "loss") == pytest.approx(runs.column("fp32", "loss"), rel=1e-5)


def test_the_base_is_another_than_the_stored(runs: Results) -> None:
    """The losses of the three bases differ, those of 8 bits least."""
    stored, int8, nf4 = (runs.column(name, "loss")[0] for name in ("not quantized", "int8", "fp32"))
    assert 1e-6 < abs(int8 - stored) < abs(nf4 - stored) < 0.05 * stored


def transformers_model(runs: Results, run: str) -> Any:
    """Transformers' GPT-J on the base as the run quantizes it, for fp32."""
    quantization = {
        "fp32": transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        "int8": transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
        "not quantized": None,
    }
    return transformers.AutoModelForCausalLM.from_pretrained(
        runs.folder / "base", dtype=torch.float32, quantization_config=quantization[run], device_map="cpu"
    )


@pytest.mark.parametrize("run", ["fp32", "int8", "not quantized"])
def test_fp32_follows_peft_and_bitsandbytes_in_a_plain_loop(runs: Results, run: str) -> None:
    """The same adapters at first, AdamW in one process, the same batches; with the base quantized and not."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    # Training mode: otherwise bitsandbytes computes in bf16 on a CPU with AVX-512, whatever the dtype.
    adapted = peft.get_peft_model(transformers_model(runs, run), config).train()
    start = runs.weights("plain before" if run == "not quantized" else "before")
    named = {f"base_model.model.{name}": tensor for name, tensor in start.items() if "lora_" in name}
    peft.set_peft_model_state_dict(adapted, named)
    losses, norms = reference.train_adapters(adapted, STEPS)
    assert runs.column(run, "loss") == pytest.approx(losses, rel=1e-6)
    assert runs.column(run, "grad_norm") == pytest.approx(norms, rel=1e-5)


def test_resumed_equals_straight_bit_for_bit(runs: Results) -> None:
    assert runs.column("first half", "loss") + runs.column("second half", "loss") == runs.column("stage 2", "loss")
    straight, resumed = runs.weights("stage 2"), runs.weights("second half")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


def test_a_checkpoint_holds_the_adapters_alone(runs: Results) -> None:
    (step,) = (runs.folder / "interrupted" / "checkpoints").iterdir()
    manifest = json.loads((step / "manifest.json").read_text())
    assert len(manifest["parameters"]) == 2 * 6 * 2
    assert all("lora_" in name for name in manifest["parameters"])


@pytest.mark.parametrize("name", ["fp32", "stage 1"])
def test_the_export_has_the_unquantized_base(runs: Results, name: str) -> None:
    """Every bit of what no adapter changes, and the product added to the stored weights."""
    export = runs.folder / name / "export_fp32"
    merged, base = load_file(export / "model.safetensors"), load_file(runs.folder / "base" / "model.safetensors")
    weights = runs.weights(name)
    assert merged.keys() == base.keys()
    for parameter, tensor in merged.items():
        module = parameter.removesuffix(".weight")
        expected = base[parameter]
        if f"{module}.lora_A.weight" in weights:
            product = weights[f"{module}.lora_B.weight"].double() @ weights[f"{module}.lora_A.weight"].double()
            expected = (expected.double() + 2.0 * product).float()
            assert (tensor - expected).abs().max() <= 1e-6, parameter
        else:
            assert torch.equal(tensor, expected), parameter
    report = json.loads((runs.folder / name / "export_fp32_report.json").read_text())
    assert report["logits"]["relative_difference"] < 1e-5
    assert 0.001 < report["logits"]["difference_of_quantized_base"] < 0.3


def test_new_rows_reach_the_export(runs: Results) -> None:
    base = load_file(runs.folder / "base" / "model.safetensors")["transformer.wte.weight"]
    exported = load_file(runs.folder / "new rows" / "export_fp32" / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(exported[5], base[[1, 2]].mean(dim=0))


@pytest.mark.parametrize("in_4_bits", [True, False])
def test_peft_loads_the_adapter_with_and_without_4_bits(runs: Results, in_4_bits: bool) -> None:
    model = transformers_model(runs, "fp32" if in_4_bits else "not quantized")
    theirs = peft.PeftModel.from_pretrained(model, runs.folder / "fp32" / "adapter").eval()
    ids = torch.randint(VOCAB, (2, 13))
    found = theirs(ids).logits
    exported = GPTJForCausalLM.from_pretrained(runs.folder / "fp32" / "export_fp32")(ids).logits
    gap = (found - exported).abs().max() / exported.abs().max()
    # The export is the adapters on the stored base; on the quantized one the logits are those of the training.
    assert 0.001 < gap < 0.3 if in_4_bits else gap < 1e-5


def test_faster_b_matrices_learn_faster(runs: Results) -> None:
    """LoRA+: B moves four times as far in the first step, in which A has no gradient but decay."""
    name = "transformer.h.0.attn.q_proj.lora_B.weight"
    slow, fast = (runs.weights(run)[name].abs().mean() for run in ("fp32", "faster B"))
    assert 2 < fast / slow < 6


def test_training_starts_from_an_adapter_folder(runs: Results) -> None:
    before, continued = runs.weights("fp32"), runs.weights("continued")
    adapters = [name for name in before if "lora_" in name]
    assert len(adapters) == 24
    assert all(torch.equal(before[name], continued[name]) for name in adapters)


def test_what_is_in_the_adapter_folder(runs: Results) -> None:
    config = json.loads((Path(runs.folder) / "fp32" / "adapter" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["r"], sorted(config["target_modules"])[0]) == (False, 4, "fc_in")
