"""Plan the memory, disk and time of a training run by arithmetic; nothing is started.

Memory follows from DeepSpeed 0.19.8's buffers (runtime/zero/stage3.py, stage_1_and_2.py) and from what autograd
keeps of our blocks. Not counted: libraries and the CUDA context (1 to 2 GB a rank), and what page-locking rounds up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import nn

from gptj_train.config import FinetuneConfig, PlanConfig
from gptj_train.counted import counted
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.loss import CHUNK
from gptj_train.training.accumulation import accumulation_steps
from gptj_train.training.retention import disk_needed
from gptj_train.weights.stored import is_adapter

_RANKS = (1, 2, 4, 8, 16, 32, 64)
_GPU_SIZES = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)  # GB, as sold
_LIBRARIES = 2e9  # bytes of a GPU for the CUDA context and libraries
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}  # per element
_PLACE = {"none": "GPU", "cpu": "host", "nvme": "NVMe"}
# DeepSpeed's defaults in elements (runtime/zero/config.py), which engine.deepspeed may change.
_ZERO_DEFAULTS = {"reduce_bucket_size": 5e8, "stage3_max_live_parameters": 1e9, "sub_group_size": 1e9}

_OPTIMIZER_BYTES = 12  # per trained parameter: fp32 master weight and two fp32 Adam moments
_GRADIENT_BYTES = 4  # per trained parameter: gradients accumulate in fp32
# Bytes per trained parameter that an optimizer step on the host moves: gradient clipping reads and writes 8; Adam
# reads 16 (master, moments, gradient) and writes 12; the copy to bf16 reads 4 and writes 2.
_HOST_STEP_BYTES = 42
_NVME_STEP_BYTES = 28  # and from and to NVMe: 16 are read, 12 written

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class RunPlan:
    """The arithmetic of a run.

    Attributes:
        shapes: shapes of all parameters by name.
        trained: shapes of the trained parameters.
        model_config: the model.
        cfg: config of the run.
    """

    shapes: Shapes
    trained: Shapes
    model_config: GPTJConfig
    cfg: FinetuneConfig

    @staticmethod
    def of(module: nn.Module, model_config: GPTJConfig, cfg: FinetuneConfig) -> RunPlan:
        """Plan a run that trains this module, which may be on the meta device."""
        shapes, trained = {}, {}
        for name, parameter in module.named_parameters():
            shapes[name] = parameter.shape
            if parameter.requires_grad:
                trained[name] = parameter.shape
        return RunPlan(shapes, trained, model_config, cfg)

    def memory(self, ranks: int) -> dict[str, float]:
        """Return the peak bytes of each rank in a step: on its GPU, on the host, on NVMe.

        Without a GPU the first two are the same memory.
        """
        engine = self.cfg.engine
        element = _BYTES[engine.precision]
        zero = _ZERO_DEFAULTS | engine.deepspeed.get("zero_optimization", {})
        parameters = _count(self.shapes)
        trained = _count(self.trained)
        # ZeRO 1 partitions the optimizer state over the ranks, 2 the gradients too, 3 the weights too.
        optimizer_parts = ranks if engine.stage >= 1 else 1
        gradient_parts = ranks if engine.stage >= 2 else 1
        weight_parts = ranks if engine.stage >= 3 else 1

        held = {"GPU": self.activations(), "host": 0.0, "NVMe": 0.0}
        held[_PLACE[engine.offload_parameters]] += element * parameters / weight_parts
        held[_PLACE[engine.offload_optimizer]] += _OPTIMIZER_BYTES * trained / optimizer_parts
        if engine.stage == 3:
            # Weights are gathered whole for use; DeepSpeed keeps at most this many.
            held["GPU"] += element * min(parameters, zero["stage3_max_live_parameters"])
        if engine.stage == 0:
            # Whole gradients, and no buckets to reduce them in.
            held["GPU"] += element * trained
            return held
        # A bucket of gradients, the tensor it is flattened into, and the result of its reduction.
        bucket = min(trained, zero["reduce_bucket_size"])
        held["GPU"] += 3 * element * bucket
        # The optimizer reads a copy of the accumulated gradients: of all its own at once on the host, of a sub-group
        # at a time on a GPU.
        accumulated = _GRADIENT_BYTES * trained / gradient_parts
        copied = trained / optimizer_parts
        if engine.offload_optimizer == "none":
            held["GPU"] += accumulated + _GRADIENT_BYTES * min(copied, zero["sub_group_size"])
        else:
            held["GPU" if engine.accumulate_on == "gpu" else "host"] += accumulated
            held["host"] += _GRADIENT_BYTES * copied
        return held

    def page_locked(self, ranks: int) -> float:
        """Return the bytes of the host that each rank locks for copies to its GPU, on stage 3; part of ``memory``."""
        engine = self.cfg.engine
        trained = _count(self.trained) / ranks
        locked = 0.0
        if engine.offload_parameters == "cpu":
            locked += _BYTES[engine.precision] * trained
        if engine.offload_optimizer != "none":
            locked += _GRADIENT_BYTES * trained
            if engine.accumulate_on == "optimizer":
                locked += _GRADIENT_BYTES * trained
        return locked

    def activations(self) -> float:
        """Return the bytes that the forward of a micro-batch keeps for the backward, and those of the loss."""
        cfg = self.cfg
        element = _BYTES[cfg.engine.precision]
        tokens = cfg.micro_batch_size * cfg.sequence_length
        hidden = element * tokens * self.model_config.n_embd
        inner = element * tokens * self.model_config.inner_size
        # Of a block: its input, the layer norm's output, queries, keys, values and the attention's output; of the
        # MLP, what goes into the activation and what comes out.
        block = 6 * hidden + 2 * inner
        layers = self.model_config.n_layer
        kept_of_block = {
            "none": block,
            "gelu": block - inner,
            "mlp": block - 2 * inner,
            "block": hidden,
        }
        degree = cfg.engine.activation_checkpointing
        # What one block does not keep exists once more, while the backward recomputes it.
        kept = layers * kept_of_block[degree] + (block - kept_of_block[degree])
        return kept + self._loss_memory(element, tokens)

    def _loss_memory(self, element: int, tokens: int) -> float:
        """Return the bytes of the loss, which is computed in chunks of tokens (model/loss.py)."""
        vocabulary = self.model_config.vocab_size
        # fp32 logits of a chunk and their gradient.
        logits = 8 * min(CHUNK, tokens) * vocabulary
        if "lm_head.weight" not in self.trained:
            return logits
        # The gradient of the head: summed over the chunks in fp32, then copied to the weights' precision.
        return logits + (4 + element) * self.model_config.n_embd * vocabulary

    def disk(self) -> tuple[int, int, int]:
        """Return the bytes of a checkpoint, the largest number of checkpoints at a time, the bytes of the export."""
        cfg = self.cfg
        checkpoint, most = disk_needed(
            _count(self.trained),
            steps=range(cfg.max_steps),
            save_every=cfg.save_every,
            keep=cfg.keep_checkpoints,
            keep_every=cfg.keep_every,
        )
        # Adapters are merged into the weights.
        exported = {name: shape for name, shape in self.shapes.items() if not is_adapter(name)}
        return checkpoint, most, _BYTES[cfg.export_dtype] * _count(exported)

    def flops(self) -> float:
        """Return the floating-point operations of a step: matrix products, and causal attention over whole sequences.

        A product with a matrix of P elements takes 2P operations a token. The two products of causal attention take
        together 2 * sequence_length * n_embd a token and layer, half of full attention's.
        """
        cfg = self.cfg
        matrices, not_recomputed = {}, {}
        for name, shape in self.shapes.items():
            if len(shape) != 2 or "wte" in name:
                continue  # the embedding is a look-up
            matrices[name] = shape
            # Recomputation leaves out the head, and each block's last product: no gradient needs its result.
            if "lm_head" in name or "fc_out.weight" in name:
                not_recomputed[name] = shape
        attention = self.model_config.n_embd * cfg.sequence_length * self.model_config.n_layer
        forward = 2 * (_count(matrices) + attention)
        # The backward takes a forward's operations for the gradients of the inputs, and again for those of the
        # weights, where these are trained: not for frozen weights under adapters.
        trains_matrices = _count(self.trained) > _count(matrices) / 2
        passes = 3 if trains_matrices else 2
        recomputed = 0
        if cfg.engine.activation_checkpointing == "block":
            recomputed = forward - 2 * _count(not_recomputed)
        elif cfg.engine.activation_checkpointing == "mlp":
            recomputed = 2 * _count({name: shape for name, shape in matrices.items() if "fc_in.weight" in name})
        tokens = cfg.global_batch_size * cfg.sequence_length
        return tokens * (passes * forward + recomputed)

    def memory_line(self, ranks: int, with_gpu: bool) -> str:
        """Describe the memory of a rank, for the table at the top of a run's report."""
        held = self.memory(ranks)
        if not with_gpu:
            held = {"host": held["GPU"] + held["host"], "NVMe": held["NVMe"]}
        parts = [f"{size / 2**30:.1f} GiB on the {place}" for place, size in held.items() if size]
        return ", ".join(parts) + " planned for a rank, without libraries"

    def step_seconds(self, ranks: int, speed: PlanConfig) -> float:
        """Return the seconds of a step: computation, and the optimizer where it is offloaded; no communication."""
        engine = self.cfg.engine
        seconds = self.flops() / (ranks * speed.tflops_per_gpu * 1e12)
        nodes = -(-ranks // speed.gpus_per_node)  # rounded up
        trained_per_node = _count(self.trained) / nodes
        if engine.offload_optimizer != "none":
            seconds += _HOST_STEP_BYTES * trained_per_node / (speed.host_gb_per_second * 1e9)
        if engine.offload_optimizer == "nvme":
            seconds += _NVME_STEP_BYTES * trained_per_node / (speed.nvme_gb_per_second * 1e9)
        return seconds


def plan_lines(plan: RunPlan, cfg: PlanConfig) -> Iterator[str]:
    """Yield the lines that recipes/plan.py prints.

    Raises:
        UserError: a global batch that divides on no number of GPUs.
    """
    checkpoint, most, export = plan.disk()
    tokens = cfg.global_batch_size * cfg.sequence_length
    yield f"model   {counted(_count(plan.shapes), 'parameter')}, {_count(plan.trained):,} of them trained"
    yield (
        f"engine  ZeRO stage {cfg.engine.stage}, {cfg.engine.precision}, optimizer on the "
        f"{_PLACE[cfg.engine.offload_optimizer]}, idle weights on the {_PLACE[cfg.engine.offload_parameters]}"
    )
    yield (
        f"step    {cfg.global_batch_size} x {cfg.sequence_length} = {counted(tokens, 'token')}; "
        f"{counted(cfg.max_steps, 'step')}: {cfg.max_steps * tokens / 1e6:,.1f} million"
    )
    yield (
        f"disk    {counted(most, 'checkpoint')} of {_gb(checkpoint)} GB at a time and an export of {_gb(export)} GB: "
        f"{_gb(most * checkpoint + export)} GB"
    )
    yield ""
    yield "GPUs  accumulated  GB a GPU  fits on  host GB a node  NVMe GB a node  s a step     hours"
    possible = [ranks for ranks in _RANKS if cfg.global_batch_size % (ranks * cfg.micro_batch_size) == 0]
    if not possible:
        accumulation_steps(cfg.global_batch_size, cfg.micro_batch_size, world_size=1)  # raises, with advice
    for ranks in possible:
        yield _row(plan, cfg, ranks)
    yield ""
    yield (
        "Libraries take 1 to 2 GB more of each GPU, and of the host for each rank. Times: at "
        f"{cfg.tflops_per_gpu:g} TFLOP/s a GPU and {cfg.host_gb_per_second:g} GB/s of a node's memory, "
        "and without communication."
    )


def _row(plan: RunPlan, cfg: PlanConfig, ranks: int) -> str:
    """Format a row of the table: this many GPUs."""
    held = plan.memory(ranks)
    seconds = plan.step_seconds(ranks, cfg)
    hours = seconds * cfg.max_steps / 3600
    fitting = [size for size in _GPU_SIZES if size * 1e9 >= held["GPU"] + _LIBRARIES]
    fits_on = f"{fitting[0]} GB" if fitting else "none"
    ranks_on_node = min(ranks, cfg.gpus_per_node)
    host = ranks_on_node * held["host"]
    nvme = ranks_on_node * held["NVMe"]
    accumulation = accumulation_steps(cfg.global_batch_size, cfg.micro_batch_size, ranks)
    return (
        f"{ranks:>4}{accumulation:>13}{_gb(held['GPU']):>10}{fits_on:>9}{_gb(host):>16}{_gb(nvme):>16}"
        f"{seconds:>10.1f}{hours:>10.1f}"
    )


def _count(shapes: Shapes) -> int:
    """Return the number of elements."""
    return sum(prod(shape) for shape in shapes.values())


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"
