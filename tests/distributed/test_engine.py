"""The engine against a plain PyTorch loop, itself on other rank counts, and itself interrupted."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
import transformers
from ranks import Results
from safetensors.torch import load_file
from toy import VOCAB, optim_config, windows_in_order

from gptj_train import GPTJForCausalLM

pytestmark = pytest.mark.distributed

STEPS = 12


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference of a weight, in units of the learning rate: about how far one step moves it."""
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs) / optim_config().lr


def on_average(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Mean difference of a weight, in units of the learning rate. For bf16: where a gradient is nearly zero its
    rounding decides its sign, and Adam then moves the weight a whole step the other way."""
    apart = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in theirs])
    return apart.mean().item() / optim_config().lr


def test_fp32_follows_the_plain_loop(results: Results) -> None:
    """All in fp32, only the order of sums differs: losses to 1e-5, weights to 2 % of one step's move."""
    losses, norms, masters = reference.train(torch.float32, STEPS)
    assert results.column("fp32", "loss") == pytest.approx(losses, rel=1e-5)
    assert results.column("fp32", "grad_norm") == pytest.approx(norms, rel=1e-4)
    assert min(norms) > optim_config().clip_norm  # clipping was at work
    assert furthest(results.weights("fp32"), masters) < 0.02


def test_bf16_follows_the_plain_loop(results: Results) -> None:
    """bf16 gradients (8 bits) are averaged over ranks in bf16: losses to 2e-3, weights to 5 % of a step's move."""
    losses, norms, masters = reference.train(torch.bfloat16, STEPS)
    assert results.column("bf16", "loss") == pytest.approx(losses, rel=2e-3)
    assert results.column("bf16", "grad_norm") == pytest.approx(norms, rel=2e-2)
    assert on_average(results.weights("bf16"), masters) < 0.05


def test_master_weights_keep_more_than_bf16(results: Results) -> None:
    weights = results.weights("bf16")
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())


@pytest.mark.parametrize("other", ["1 rank", "4 ranks", "stage 0 fp32"])
def test_any_number_of_ranks_trains_the_same(results: Results, other: str) -> None:
    """4 windows a step: 1 rank x 4 accumulated, 2 x 2 and 4 x 1, with ragged targets, some windows without any."""
    assert results.column(other, "loss") == pytest.approx(results.column("fp32", "loss"), rel=1e-5)
    assert results.column(other, "grad_norm") == pytest.approx(results.column("fp32", "grad_norm"), rel=1e-4)
    assert results.column(other, "tokens") == results.column("fp32", "tokens")
    assert furthest(results.weights(other), results.weights("fp32")) < 0.02


@pytest.mark.parametrize(("name", "ranks"), [("1 rank", 1), ("fp32", 2), ("4 ranks", 4)])
def test_the_order_of_windows_is_the_same(results: Results, name: str, ranks: int) -> None:
    of_rank = [results.of(name, rank)["rows"] for rank in range(ranks)]
    for step, windows in enumerate(windows_in_order(0, STEPS)):
        turns = zip(*(rows[step] for rows in of_rank), strict=True)
        assert [row for turn in turns for micro in turn for row in micro] == windows


@pytest.mark.parametrize("other", ["1 rank", "4 ranks"])
def test_uneven_evaluation_is_exact(results: Results, other: str) -> None:
    here, there = results.of("fp32")["evaluation"], results.of(other)["evaluation"]
    assert here["eval_tokens"] == there["eval_tokens"] > 0
    assert here["eval_loss"] == pytest.approx(there["eval_loss"], rel=1e-5)
    assert results.of("fp32", 1)["evaluation"] == here


def test_resumed_equals_straight_bit_for_bit(results: Results) -> None:
    """bf16, ZeRO-3, offload, dropout; the second half in new processes."""
    for name in ("loss", "grad_norm", "lr", "tokens"):
        halves = results.column("first half", name) + results.column("second half", name)
        assert halves == results.column("straight", name), name
    straight, resumed = results.weights("straight"), results.weights("second half")
    for name, tensor in straight.items():
        assert torch.equal(resumed[name], tensor), name


@pytest.mark.parametrize("degree", ["gelu", "mlp", "block"])
def test_recomputed_activations_change_nothing(results: Results, degree: str) -> None:
    name = f"recomputed {degree}"
    assert results.column(name, "loss") == pytest.approx(results.column("fp32", "loss"), rel=1e-6)
    assert furthest(results.weights(name), results.weights("fp32")) < 0.02


STAGES = [f"stage {stage}{place}" for stage in range(4) for place in ("", " cpu") if (stage, place) != (0, " cpu")]


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_and_place_trains_alike(results: Results, name: str) -> None:
    """bf16 on every stage; they differ in where and when gradients are rounded and summed."""
    assert results.column(name, "loss") == pytest.approx(results.column("stage 3 both", "loss"), rel=2e-3)
    assert on_average(results.weights(name), results.weights("stage 3 both")) < 0.05


def test_where_gradients_are_summed_changes_no_bit(results: Results) -> None:
    ours, theirs = "stage 3 sums on the device", "stage 3 both"
    assert results.column(ours, "loss") == results.column(theirs, "loss")
    for name, tensor in results.weights(theirs).items():
        assert torch.equal(results.weights(ours)[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_export_is_the_master(results: Results, dtype: torch.dtype) -> None:
    folder = results.folder / "fp32" / ("export_fp32" if dtype == torch.float32 else "export_bf16")
    stored = load_file(folder / "model.safetensors")
    masters = results.weights("fp32")
    assert stored.keys() == masters.keys()
    for name, tensor in masters.items():
        assert torch.equal(stored[name], tensor.to(dtype)), name
    options: dict[str, Any] = {"dtype": "auto", "output_loading_info": True}
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not any(report.values()), report
    assert theirs.dtype == dtype
    ids = torch.randint(VOCAB, (2, 13))
    ours = GPTJForCausalLM.from_pretrained(folder)
    gap = (ours(ids).logits.float() - theirs(ids).logits.float()).abs().max()
    assert gap < (1e-5 if dtype == torch.float32 else 0.05)
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) > 256


@pytest.mark.parametrize("name", ["from fp32", "from fp32 to bf16"])
def test_training_starts_from_the_folder_s_weights(results: Results, name: str) -> None:
    """The master keeps the file's fp32 bits, whatever the precision of the forward pass."""
    stored = load_file(results.folder / "fp32" / "export_fp32" / "model.safetensors")
    for parameter, tensor in results.weights(name).items():
        assert torch.equal(tensor, stored[parameter]), parameter
