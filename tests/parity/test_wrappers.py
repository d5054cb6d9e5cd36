"""DistributedDataParallel and FSDP on two ranks give the gradients of one process; so do compiled graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pair import SMALL, assert_close, build_pair, gradients, padding_mask, random_ids
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gptj_train import GPTJConfig, GPTJForCausalLM

WRAPPERS = ("ddp", "ddp static graph", "ddp unused parameters", "fsdp1", "fsdp2")


def build() -> tuple[GPTJForCausalLM, Tensor]:
    torch.manual_seed(0)
    model = GPTJForCausalLM(GPTJConfig(**SMALL, initializer_range=0.2))
    return model.train(), random_ids(4)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return a loss through several tensors of the output, some of them in tuples."""
    out = model(input_ids=ids, labels=ids, output_hidden_states=True)
    loss: Tensor = out.loss + 1e-2 * out.logits.square().mean() + 1e-2 * out["hidden_states"][1].square().mean()
    return loss


def wrapped(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if wrapper == "fsdp2":
        for block in model.transformer.h:
            fully_shard(block)
        return fully_shard(model)
    return DistributedDataParallel(
        model,
        static_graph=wrapper == "ddp static graph",
        find_unused_parameters=wrapper == "ddp unused parameters",
    )


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for wrapper in WRAPPERS:
        model, ids = build()
        parallel = wrapped(model, wrapper)
        for _ in range(2):
            # Twice: static_graph only takes its own way in the second step.
            parallel.zero_grad()
            loss_of(parallel, ids[2 * rank : 2 * rank + 2]).backward()
        if wrapper == "fsdp1":
            with FullyShardedDataParallel.summon_full_params(parallel, with_grads=True):
                found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        else:
            found = {name: _whole(parameter.grad) for name, parameter in model.named_parameters()}
        if rank == 0:
            torch.save(found, f"{folder}/{wrapper}")
    dist.destroy_process_group()


def _whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gradients of every wrapper, from one start of two ranks."""
    path = tmp_path_factory.mktemp("wrappers")
    torch.multiprocessing.start_processes(run_rank, args=(str(path),), nprocs=2, start_method="spawn")
    return path


@pytest.mark.distributed
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_of_two_ranks(folder: Path, wrapper: str) -> None:
    model, ids = build()
    (0.5 * (loss_of(model, ids[:2]) + loss_of(model, ids[2:]))).backward()
    expected = gradients(model)
    found = torch.load(folder / wrapper, weights_only=True)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-4)


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "left padding": {"attention_mask": padding_mask([11, 4], "left")},
    "labels": {"labels": torch.arange(22).view(2, 11)},
    "positions": {"position_ids": torch.arange(11).expand(2, 11), "use_cache": False},
    "documents": {"document_ids": torch.tensor([[0] * 5 + [1] * 6, [2] * 11])},
}


@pytest.mark.parametrize("call", CALLS)
def test_whole_graph_compiles(call: str) -> None:
    torch._dynamo.reset()
    model, _ = build_pair()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = random_ids()
    out, expected = compiled(ids, **CALLS[call]), model(ids, **CALLS[call])
    assert list(out) == list(expected)
    assert_close(out.logits, expected.logits)
    found = []
    for output in (out, expected):
        model.zero_grad()
        (output.logits.square().mean() if output.loss is None else output.loss).backward()
        found.append(gradients(model))
    for name, gradient in found[1].items():
        assert_close(found[0][name], gradient, 1e-4)


@pytest.mark.parametrize("call", CALLS)
def test_export(call: str) -> None:
    model, _ = build_pair()
    ids = random_ids()
    program = torch.export.export(model, (ids,), CALLS[call])
    out = program.module()(ids, **CALLS[call])
    assert_close(out.logits, model(ids, **CALLS[call]).logits)


@pytest.mark.slow
def test_generated_code_gives_the_same_numbers() -> None:
    """By torch's default backend, which compiles C++."""
    torch._dynamo.reset()
    model, _ = build_pair()
    compiled = torch.compile(model, fullgraph=True)
    ids = random_ids()
    found = []
    for forward in (compiled, model):
        model.zero_grad()
        out = forward(ids, **CALLS["labels"])
        out.loss.backward()
        found.append((out.logits.detach(), gradients(model)))
    (logits, compiled_gradients), (expected, expected_gradients) = found
    assert_close(logits, expected)
    for name, gradient in expected_gradients.items():
        assert_close(compiled_gradients[name], gradient, 1e-4)
