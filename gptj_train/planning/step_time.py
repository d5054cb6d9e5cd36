"""The seconds of a step, by term: computation, copies, disks, communication.

Within a micro-batch computation, copies each way, disk and communication overlap as far as they can: the slowest
counts. What the optimizer does follows after it.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptj_train.launch.machine import Machine
from gptj_train.planning.memory import FP32
from gptj_train.planning.run_plan import RunPlan
from gptj_train.training.accumulation import accumulation_steps

# Bytes per trained parameter that an optimizer step on the host moves: gradient clipping reads and writes 8; Adam
# reads 16 (master, moments, gradient) and writes 12; the copy to bf16 reads 4 and writes 2.
_HOST_STEP_BYTES = 42
_NVME_STEP_BYTES = 32  # and from and to NVMe: 16 are read, 12 written, 4 of the gradient written before
_PAGEABLE_SPEED = 10e9  # bytes a second to a GPU from host memory that is not page-locked


@dataclass(frozen=True)
class StepTime:
    """Seconds by term.

    Attributes:
        micro_batch: of one micro-batch, of which the slowest counts.
        update: after the last micro-batch, one after the other.
        accumulation: micro-batches in a step.
    """

    micro_batch: dict[str, float]
    update: dict[str, float]
    accumulation: int

    @property
    def seconds(self) -> float:
        return self.accumulation * max(self.micro_batch.values()) + sum(self.update.values())


def step_time(plan: RunPlan, machine: Machine) -> StepTime:
    """Return the time of a step.

    Raises:
        UserError: a global batch that does not divide.
    """
    cfg = plan.cfg
    accumulation = accumulation_steps(cfg.global_batch_size, cfg.micro_batch_size, machine.ranks)
    micro_batch = {"computation": flops(plan) / accumulation / machine.ranks / machine.speeds.compute}
    if machine.has_gpus:
        micro_batch |= _copies(plan, machine)
    if cfg.engine.offload_parameters == "nvme":
        read = _weight_passes(plan) * plan.element * plan.sizes.all_elements / machine.nodes
        micro_batch["weights from NVMe"] = read / machine.speeds.nvme
    if cfg.engine.stage >= 2:
        micro_batch |= _communication(plan, machine, every_micro_batch=True)
    update = _update(plan, machine)
    return StepTime(_present(micro_batch), _present(update), accumulation)


def flops(plan: RunPlan) -> float:
    """Return the floating-point operations of a step: matrix products, and causal attention over whole sequences.

    A product with a matrix of P elements takes 2P operations a token. The two products of causal attention take
    together 2 * sequence_length * n_embd a token and layer, half of full attention's.
    """
    cfg, sizes = plan.cfg, plan.sizes
    attention = plan.model_config.n_embd * cfg.sequence_length * plan.model_config.n_layer
    forward = 2 * (sizes.matrix_elements + attention)
    # The backward takes a forward's operations for the gradients of the inputs, and again for those of the weights,
    # where these are trained: not for frozen weights under adapters.
    passes = 3 if sizes.trains_matrices else 2
    recomputed = 0
    if cfg.engine.activation_checkpointing == "block":
        recomputed = forward - 2 * sizes.not_recomputed_elements
    elif cfg.engine.activation_checkpointing == "mlp":
        recomputed = 2 * sizes.fc_in_elements
    tokens = cfg.global_batch_size * cfg.sequence_length
    return float(tokens * (passes * forward + recomputed))


def _weight_passes(plan: RunPlan) -> int:
    """Return how often a micro-batch fetches the weights: forward and backward, or once if they are few enough."""
    return 2 if plan.sizes.all_elements > plan.zero("stage3_max_live_parameters") else 1


def _copies(plan: RunPlan, machine: Machine) -> dict[str, float]:
    """Return the seconds of a micro-batch's copies between GPU and host."""
    engine = plan.cfg.engine
    to_gpu = to_host = 0.0
    if engine.offload_parameters != "none":
        to_gpu += _weight_passes(plan) * plan.element * plan.sizes.all_elements / machine.ranks
    if engine.offload_optimizer != "none" and engine.accumulate_on == "optimizer":
        # fp32 sums on the host: to the GPU to be added to, and back (stage3.py, partition_grads).
        sums = FP32 * plan.sizes.trained_elements / machine.ranks
        to_gpu += sums
        to_host += sums
    # The host's memory serves all ranks of a node.
    through_host = machine.ranks_per_node * (to_gpu + to_host) / machine.speeds.host
    return {
        "copies to the GPU": max(to_gpu / machine.speeds.pcie, through_host),
        "copies to the host": to_host / machine.speeds.pcie,
    }


def _communication(plan: RunPlan, machine: Machine, *, every_micro_batch: bool) -> dict[str, float]:
    """Return the seconds of the collectives of a micro-batch, or of a step.

    Stage 3 gathers the weights for forward and backward and scatters the gradients' sums with every micro-batch.
    Stage 2 scatters the sums with every micro-batch and gathers the weights once a step; stage 1 does both once.
    """
    weights = plan.element * plan.sizes.all_elements
    gradients = plan.element * plan.sizes.trained_elements
    updated = plan.element * plan.sizes.trained_elements
    stage = plan.cfg.engine.stage
    volume = 0.0
    if every_micro_batch:
        volume = gradients + (_weight_passes(plan) * weights if stage == 3 else 0)
    elif stage == 2:
        volume = updated
    elif stage < 2:
        # On stage 0 an all-reduce moves as much: gradients scattered and gathered.
        volume = updated + gradients
    # In a ring each link carries all but one rank's part, into each GPU and into each node.
    volume *= 1 - 1 / machine.ranks
    terms = {}
    if machine.ranks_per_node > 1 and machine.has_gpus:
        terms["between GPUs"] = volume / machine.speeds.gpu_link
    if machine.nodes > 1:
        terms["between nodes"] = volume / machine.speeds.network
    return terms


def _update(plan: RunPlan, machine: Machine) -> dict[str, float]:
    """Return the seconds of what follows the last micro-batch."""
    engine = plan.cfg.engine
    trained = plan.sizes.trained_elements
    per_node = trained / machine.nodes
    per_rank = trained / machine.ranks
    terms = _communication(plan, machine, every_micro_batch=False)
    if engine.offload_optimizer != "none":
        if machine.has_gpus:
            terms["gradients to the host"] = FP32 * per_rank / machine.speeds.pcie
        terms["optimizer on the host"] = _HOST_STEP_BYTES * per_node / machine.speeds.host
        if machine.has_gpus and engine.offload_parameters == "none":
            pageable = min(_PAGEABLE_SPEED, machine.speeds.pcie)
            terms["updated weights to the GPU"] = plan.element * per_rank / pageable
    on_nvme = 0.0
    if engine.offload_optimizer == "nvme":
        on_nvme += _NVME_STEP_BYTES * per_node
    if engine.offload_parameters == "nvme":
        on_nvme += plan.element * per_node
    if on_nvme:
        terms["optimizer state on NVMe"] = on_nvme / machine.speeds.nvme
    return terms


def _present(terms: dict[str, float]) -> dict[str, float]:
    return {name: seconds for name, seconds in terms.items() if seconds > 0 or name == "computation"}
