"""What a training run needs of memory, disk and time, by arithmetic; nothing is started.

Memory follows from DeepSpeed 0.19.8's buffers (runtime/zero/stage3.py, stage_1_and_2.py) and from what autograd
keeps of our blocks. Not counted: libraries and CUDA context (1 to 2 GB a rank), and what page-locking rounds up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import nn

from gptj_train.config import FinetuneConfig, PlanConfig
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.loss import CHUNK
from gptj_train.training.accumulation import accumulation_steps
from gptj_train.training.retention import disk_needed
from gptj_train.weights.stored import is_adapter

_RANKS = (1, 2, 4, 8, 16, 32, 64)
_CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)  # GB of GPUs that there are
_UNCOUNTED = 2e9  # bytes of a GPU
_WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}
_PLACE = {"none": "GPU", "cpu": "host", "nvme": "NVMe"}
_DEEPSPEED = {"reduce_bucket_size": 5e8, "stage3_max_live_parameters": 1e9, "sub_group_size": 1e9}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class RunPlan:
    """A run's arithmetic.

    Args:
        shapes: of all parameters. trained: of those that the optimizer changes.
    """

    shapes: Shapes
    trained: Shapes
    model: GPTJConfig
    cfg: FinetuneConfig

    @staticmethod
    def of(module: nn.Module, model: GPTJConfig, cfg: FinetuneConfig) -> RunPlan:
        """A run that trains this module, which may lie on the meta device."""
        shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        trained = {name: parameter.shape for name, parameter in module.named_parameters() if parameter.requires_grad}
        return RunPlan(shapes, trained, model, cfg)

    def memory(self, ranks: int) -> dict[str, float]:
        """Bytes that each of so many ranks holds at most in a step: on its GPU, the host, NVMe.

        Without a GPU the first two are one memory.
        """
        engine, width = self.cfg.engine, _WIDTH[self.cfg.engine.precision]
        zero = _DEEPSPEED | engine.deepspeed.get("zero_optimization", {})
        all_of_them, changed = _count(self.shapes), _count(self.trained)
        spread = {stage: ranks if engine.stage >= stage else 1 for stage in (1, 2, 3)}
        held = {"GPU": self.activations(), "host": 0.0, "NVMe": 0.0}

        held[_PLACE[engine.offload_parameters]] += width * all_of_them / spread[3]
        held[_PLACE[engine.offload_optimizer]] += 12 * changed / spread[1]  # fp32 master and two moments
        if engine.stage == 3:  # whole while they are in use
            held["GPU"] += width * min(all_of_them, zero["stage3_max_live_parameters"])
        if engine.stage == 0:
            held["GPU"] += width * changed  # gradients
            return held
        # A bucket of gradients, what it is flattened into, and what its reduction gives.
        held["GPU"] += 3 * width * min(changed, zero["reduce_bucket_size"])
        # Gradients accumulated in fp32, and a copy for the optimizer: whole, or on a GPU a sub-group at a time.
        copy = changed / spread[1]
        if engine.offload_optimizer == "none":
            held["GPU"] += 4 * changed / spread[2] + 4 * min(copy, zero["sub_group_size"])
        else:
            held["host"] += 4 * changed / spread[2] + 4 * copy
        return held

    def activations(self) -> float:
        """Bytes that a rank's micro-batch leaves for the backward, and those of the loss."""
        width, tokens = _WIDTH[self.cfg.engine.precision], self.cfg.micro_batch_size * self.cfg.sequence_length
        block = width * tokens * (6 * self.model.n_embd + 2 * self.model.inner_size)
        kept = self.model.n_layer * block
        if self.cfg.engine.activation_checkpointing:  # each block's input, and one block whole
            kept = width * tokens * self.model.n_embd * self.model.n_layer + block
        return kept + self._loss(width, tokens)

    def _loss(self, width: int, tokens: int) -> float:
        """Bytes of a chunk of logits and their gradient, and of the head's, summed up in fp32."""
        head = "lm_head.weight" in self.trained
        return self.model.vocab_size * (8 * min(CHUNK, tokens) + head * (4 + width) * self.model.n_embd)

    def disk(self) -> tuple[int, int, int]:
        """Bytes of a checkpoint, checkpoints at a time, bytes of the export."""
        cfg = self.cfg
        size, most = disk_needed(
            _count(self.trained),
            steps=range(cfg.max_steps),
            save_every=cfg.save_every,
            keep=cfg.keep_checkpoints,
            keep_every=cfg.keep_every,
        )
        exported = {name: shape for name, shape in self.shapes.items() if not is_adapter(name)}
        return size, most, _WIDTH[cfg.export_dtype] * _count(exported)

    def flops(self) -> float:
        """Floating-point operations of a step: matrix products, and causal attention over whole sequences."""
        cfg, model = self.cfg, self.model
        matrices = {name: shape for name, shape in self.shapes.items() if len(shape) == 2 and "wte" not in name}
        attention = model.n_embd * cfg.sequence_length * model.n_layer
        forward = 2 * (_count(matrices) + attention)
        # The backward is a pass for the inputs and one for the weights that are trained.
        passes = 3 if _count(self.trained) > _count(matrices) / 2 else 2
        # Recomputing leaves out the head, and each block's last product, whose result nobody asks for.
        left_out = {name: shape for name, shape in matrices.items() if "lm_head" in name or "fc_out.weight" in name}
        again = forward - 2 * _count(left_out) if cfg.engine.activation_checkpointing else 0
        return cfg.global_batch_size * cfg.sequence_length * (passes * forward + again)

    def memory_line(self, ranks: int, with_gpu: bool) -> str:
        """For the head of a run's report."""
        held = self.memory(ranks)
        if not with_gpu:
            held = {"host": held["GPU"] + held["host"], "NVMe": held["NVMe"]}
        places = ", ".join(f"{size / 2**30:.1f} GiB on the {place}" for place, size in held.items() if size)
        return f"{places} planned for a rank, without libraries"

    def step_seconds(self, ranks: int, speed: PlanConfig) -> float:
        """Of computing, and of an optimizer that is not on the GPUs; without communication."""
        changed = _count(self.trained) / -(-ranks // speed.gpus_per_node)  # of a node
        seconds = self.flops() / (ranks * speed.tflops_per_gpu * 1e12)
        if self.cfg.engine.offload_optimizer != "none":  # clipping, Adam and the copy to bf16 move 42 bytes each
            seconds += 42 * changed / (speed.host_gb_per_second * 1e9)
        if self.cfg.engine.offload_optimizer == "nvme":  # 16 are read and 12 written
            seconds += 28 * changed / (speed.nvme_gb_per_second * 1e9)
        return seconds


def lines(planned: RunPlan, cfg: PlanConfig) -> Iterator[str]:
    """What recipes/plan.py prints.

    Raises:
        UserError: a global batch that divides on no number of GPUs.
    """
    size, most, export = planned.disk()
    tokens = cfg.global_batch_size * cfg.sequence_length
    yield f"model   {_count(planned.shapes):,} parameters, {_count(planned.trained):,} of them trained"
    yield (
        f"engine  ZeRO stage {cfg.engine.stage}, {cfg.engine.precision}, optimizer on the "
        f"{_PLACE[cfg.engine.offload_optimizer]}, idle weights on the {_PLACE[cfg.engine.offload_parameters]}"
    )
    yield (
        f"step    {cfg.global_batch_size} x {cfg.sequence_length} = {tokens:,} tokens; "
        f"{cfg.max_steps:,} steps: {cfg.max_steps * tokens / 1e6:,.1f} million"
    )
    yield (
        f"disk    {most} checkpoints of {_gb(size)} GB at a time and an export of {_gb(export)} GB: "
        f"{_gb(most * size + export)} GB"
    )
    yield ""
    yield "GPUs  accumulated  GB a GPU  fits on  host GB a node  NVMe GB a node  s a step     hours"
    divides = [ranks for ranks in _RANKS if not cfg.global_batch_size % (ranks * cfg.micro_batch_size)]
    if not divides:
        accumulation_steps(cfg.global_batch_size, cfg.micro_batch_size, world_size=1)  # says why
    for ranks in divides:
        yield _row(planned, cfg, ranks)
    yield ""
    yield (
        "Libraries take 1 to 2 GB more of each GPU, and of the host for each rank. Times: at "
        f"{cfg.tflops_per_gpu:g} TFLOP/s a GPU and {cfg.host_gb_per_second:g} GB/s of a node's memory, "
        "and without communication."
    )


def _row(planned: RunPlan, cfg: PlanConfig, ranks: int) -> str:
    held, seconds = planned.memory(ranks), planned.step_seconds(ranks, cfg)
    card = next((f"{card} GB" for card in _CARDS if card * 1e9 >= held["GPU"] + _UNCOUNTED), "none")
    on_node = min(ranks, cfg.gpus_per_node)
    accumulation = accumulation_steps(cfg.global_batch_size, cfg.micro_batch_size, ranks)
    return (
        f"{ranks:>4}{accumulation:>13}{_gb(held['GPU']):>10}{card:>9}{_gb(on_node * held['host']):>16}"
        f"{_gb(on_node * held['NVMe']):>16}{seconds:>10.1f}{seconds * cfg.max_steps / 3600:>10.1f}"
    )


def _count(shapes: Shapes) -> int:
    return sum(map(prod, shapes.values()))


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"
