"""Training starts from a folder's weights and moments, bit for bit, on every stage and place of offload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import NOT_OFFLOADED, ON_HOST, Results, job, launch
from safetensors.torch import load_file, save_file
from toy import toy_config

from gptj_train import GPTJForCausalLM
from gptj_train.weights.manifest import Manifest
from gptj_train.weights.moments import MOMENTS
from gptj_train.weights.slices import SliceReader

pytestmark = pytest.mark.distributed

PLACES = {
    **{f"stage {stage}": {"stage": stage} | NOT_OFFLOADED for stage in range(4)},
    **{f"stage {stage} cpu": {"stage": stage} | ON_HOST for stage in (1, 2, 3)},
    "stage 3 both": {},
    "stage 3 weights on the host": {"offload_optimizer": "none", "offload_parameters": "cpu"},
    **{f"stage {stage} fp32": {"stage": stage, "precision": "fp32"} | NOT_OFFLOADED for stage in (0, 2, 3)},
}
UPDATES = 383_500
SOURCES = ("sharded fp32", "bf16", "bin")


def hard_to_keep() -> GPTJForCausalLM:
    """fp32 weights that no half precision holds, with the numbers that careless sums and casts change."""
    torch.manual_seed(1)
    model = GPTJForCausalLM(toy_config())
    odd = torch.tensor([-0.0, 1e-42, -1e-38, 1 + 2**-23, 3 + 2**-21, 1e-8])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
        for name in ("lm_head.bias", "transformer.h.1.mlp.fc_in.weight", "transformer.ln_f.bias"):
            model.get_parameter(name).view(-1)[-7:-1] = odd
        model.get_parameter("transformer.h.0.attn.q_proj.weight").view(-1)[:5] = odd[:5].flip(0)
    return model


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("starts")
    model = hard_to_keep()
    model.save_pretrained(folder / "source")
    model.save_pretrained(folder / "sharded fp32", max_shard_bytes=9000)
    model.save_pretrained(folder / "bin")
    (folder / "bin" / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "bin" / "pytorch_model.bin")
    model.bfloat16().save_pretrained(folder / "bf16")
    jobs = [
        job(name, steps=0, engine=engine, init_from=str(folder / "source"), export=["fp32"])
        for name, engine in PLACES.items()
    ]
    jobs += [job(name, steps=0, init_from=str(folder / name), export=["fp32"]) for name in SOURCES]
    mild = folder / "mild"
    GPTJForCausalLM(toy_config()).save_pretrained(mild)
    jobs += [
        job(f"{name}, evaluated", steps=0, engine=engine, init_from=str(mild), evaluate=True)
        for name, engine in PLACES.items()
        if "fp" not in name
    ]
    write_moments(folder / "with moments", model.float())
    jobs += [
        job(f"{name}, moments", steps=0, engine=engine, init_from=str(folder / "with moments"), save=True)
        for name, engine in PLACES.items()
    ]
    launch(2, folder, jobs)
    return Results(folder)


def write_moments(folder: Path, model: GPTJForCausalLM) -> None:
    """A folder as import_mesh leaves it: weights, and moments that are told apart by their values."""
    model.save_pretrained(folder)
    for number, moment in enumerate(MOMENTS, start=1):
        (folder / "adam" / moment).mkdir(parents=True)
        values = {name: number + torch.rand_like(tensor) for name, tensor in model.state_dict().items()}
        save_file(values, folder / "adam" / moment / "model.safetensors")
    (folder / "adam" / "state.json").write_text(json.dumps({"step": UPDATES}))


@pytest.mark.parametrize("name", PLACES)
def test_a_run_without_a_step_exports_the_source_s_bits(starts: Results, name: str) -> None:
    export = starts.folder / name / "export_fp32" / "model.safetensors"
    assert export.read_bytes() == (starts.folder / "source" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", SOURCES)
def test_every_file_format(starts: Results, name: str) -> None:
    exported = load_file(starts.folder / name / "export_fp32" / "model.safetensors")
    for parameter, tensor in load_file(starts.folder / "source" / "model.safetensors").items():
        expected = tensor.bfloat16().float() if name == "bf16" else tensor
        assert torch.equal(exported[parameter].view(torch.int32), expected.view(torch.int32)), parameter


def test_the_low_precision_weights_follow(starts: Results) -> None:
    """The bf16 copy is the master's rounding everywhere: one held-out loss."""
    losses = {name: starts.of(f"{name}, evaluated")["evaluation"]["eval_loss"] for name in PLACES if "fp" not in name}
    assert len(losses) == 9
    assert max(losses.values()) - min(losses.values()) < 1e-6 * max(losses.values()), losses


@pytest.mark.parametrize("name", PLACES)
def test_adam_resumes_from_the_moments_of_the_folder(starts: Results, name: str) -> None:
    checkpoint = starts.folder / f"{name}, moments" / "checkpoints" / "step_00000000"
    manifest = Manifest.read(checkpoint)
    assert manifest.optimizer["steps"] == UPDATES
    for moment in MOMENTS:
        expected = load_file(starts.folder / "with moments" / "adam" / moment / "model.safetensors")
        with SliceReader(checkpoint / file for file in manifest.of_kind(moment)) as reader:
            for parameter, tensor in expected.items():
                found = torch.empty(tensor.numel())
                reader.read(parameter, 0, found)
                assert torch.equal(found, tensor.view(-1)), parameter


def test_a_folder_of_another_model_is_refused(starts: Results, tmp_path: Path) -> None:
    wider = toy_config()
    wider.n_layer = 3
    GPTJForCausalLM(wider).save_pretrained(tmp_path)
    with pytest.raises(AssertionError, match=r"UserError: .*unexpected: transformer\.h\.2"):
        launch(1, tmp_path, [job("refused", micro=1, steps=0, init_from=str(tmp_path))])
