"""What a run is made of besides its steps: checkpoints, initial weights, gradients that must not count."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PLACES, Results
from safetensors.torch import load_file
from torch import Tensor

from gptj_train.training.checkpoint import Checkpoints

pytestmark = pytest.mark.distributed


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("straight", "resumed", "saved_at"), [("straight", "resumed", 5)])
def test_resumed_equals_straight_bit_for_bit(results: Results, straight: str, resumed: str, saved_at: int) -> None:
    """bf16, ZeRO-3, offload, dropout; the second part in new processes."""
    for name in ("step", "loss", "grad_norm", "lr", "tokens"):
        assert results.column(resumed, name) == results.column(straight, name)[saved_at:], name
    assert same(results.weights(resumed), results.weights(straight))


@pytest.mark.parametrize("place", PLACES)
def test_every_place_resumes_bit_for_bit(results: Results, place: str) -> None:
    """One of the steps before was left out, so that Adam has counted less of them than the run."""
    test_resumed_equals_straight_bit_for_bit(results, place, f"{place} resumed", 4)


@pytest.mark.parametrize("place", [*PLACES, "stage 0 fp32 poisoned"])
def test_gradients_that_are_not_finite_are_left_out(results: Results, place: str) -> None:
    norms = results.column(place, "grad_norm")
    assert [math.isfinite(norm) for norm in norms] == [step != 2 for step in range(len(norms))]
    assert math.isnan(results.column(place, "loss")[2])
    assert all(tensor.isfinite().all() for tensor in results.weights(place).values())


@pytest.mark.parametrize(
    ("name", "start", "held"),
    [
        ("from fp32", "fp32", torch.float32),
        ("from fp32 to bf16", "fp32", torch.bfloat16),
        ("from bf16", "bf16", torch.float32),
        ("from fp32 on stage 1", "fp32", torch.float32),
    ],
)
def test_training_starts_from_the_folder_s_weights(results: Results, name: str, start: str, held: torch.dtype) -> None:
    stored = load_file(results.folder / "fp32" / f"export_{start}" / "model.safetensors")
    assert same(results.weights(name), {key: tensor.to(held).float() for key, tensor in stored.items()})


def test_a_checkpoint_counts_only_with_every_file_of_every_rank(results: Results, tmp_path: Path) -> None:
    whole = results.folder / "straight" / "checkpoints" / "step_00000005"
    files = [file.relative_to(whole) for file in whole.rglob("*") if file.is_file()]
    assert sum("optim_states" in file.name for file in files) == 2
    assert not [file for file in files if file.suffix == ".py"]
    damaged = tmp_path / "checkpoints" / whole.name
    for file in files:
        for keep_bytes in (False, True):
            shutil.copytree(whole, damaged, dirs_exist_ok=True)
            content = (damaged / file).read_bytes()
            (damaged / file).unlink()
            if keep_bytes:
                (damaged / file).write_bytes(content[:-1])
            found = Checkpoints(tmp_path, keep=1).find("auto", world_size=2)
            # The manifest's last byte is the end of its line, which it can do without.
            assert (found is None) != (keep_bytes and file.name == "manifest.json"), file
    shutil.copytree(whole, damaged, dirs_exist_ok=True)
    assert Checkpoints(tmp_path, keep=1).find("auto", world_size=2) == damaged


def test_a_checkpoint_of_two_ranks_is_refused_on_four(results: Results) -> None:
    with pytest.raises(ValueError, match=r"written by 2 ranks, this job has 4; start it with 2"):
        Checkpoints(results.folder / "straight", keep=2).find("auto", world_size=4)
