"""Fill what a rank keeps of the model from stored weights, reading only its slices.

A trained parameter goes into the optimizer's fp32 master, which keeps every bit of an fp32 file; the low-precision
weights follow from it. A frozen parameter goes where DeepSpeed keeps this rank's part.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Size, nn

from gptj_train.model.adapter_folder import AdapterFolder, WithAdapter
from gptj_train.model.lora import LoraConfig
from gptj_train.training.deepspeed_internals import OptimizerState, is_partitioned, partition
from gptj_train.weights.checkpoint_weights import open_weights
from gptj_train.weights.mean_rows import WithMeanRows
from gptj_train.weights.moments import StoredMoments, moments_beside
from gptj_train.weights.stored import StoredWeights, is_adapter


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """The weights of a folder that fit a model, and Adam's moments if the folder has them.

    Attributes:
        names: stored name of each parameter that the folder has.
        new_head: parameters that it lacks, since it is of another task; they keep their fresh weights.
    """

    weights: StoredWeights
    names: Mapping[str, str]
    new_head: Sequence[str]
    moments: StoredMoments | None

    def report(self, folder: str) -> None:
        """Print what the folder lacks, and whether Adam's state comes from it."""
        if self.new_head:
            print(f"new head, not in {folder}: {', '.join(self.new_head)}", file=sys.stderr, flush=True)
        if self.moments is not None:
            step = f"{self.moments.steps:,}"
            print(f"resuming Adam state at step {step} from {folder}/adam", file=sys.stderr, flush=True)

    def fill_frozen(self, model: nn.Module, rank: int) -> None:
        """Fill the parameters that are not trained; before DeepSpeed wraps the model, since it copies some of them."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name not in self.names:
                continue
            if not is_partitioned(parameter):
                self.weights.read(self.names[name], 0, parameter.data.view(-1))
                continue
            with partition(parameter, rank) as (start, own):
                if own.numel() > 0:
                    self.weights.read(self.names[name], start, own)

    def fill_trained(self, state: OptimizerState) -> None:
        """Fill this rank's slices of the fp32 masters."""
        with state.changing():
            for section in state.sections:
                with section.buffers(changing=True) as buffers:
                    for piece, views in section.pieces(buffers):
                        if piece.name in self.names:
                            self.weights.read(self.names[piece.name], piece.start, views["master"])

    def fill_moments(self, state: OptimizerState) -> None:
        """Fill this rank's slices of Adam's moments and set its step; nothing to do without stored moments."""
        if self.moments is None:
            return
        with state.changing():
            for section in state.sections:
                with section.buffers(changing=True) as buffers:
                    for piece, views in section.pieces(buffers):
                        if piece.name not in self.moments.names:
                            continue
                        for moment, stored in self.moments.of.items():
                            stored.read(self.moments.names[piece.name], piece.start, views[moment])
        state.set_counters({"steps": self.moments.steps, "loss_scale": {}})


@contextmanager
def open_initial_weights(
    folder: str,
    *,
    shapes: Mapping[str, Size],
    trained: Mapping[str, Size],
    mean_rows: Mapping[int, Sequence[int]],
    new_head_allowed: bool,
    share: tuple[int, int],
    lora: LoraConfig | None = None,
) -> Iterator[InitialWeights]:
    """Open a folder of weights and check that they are this model's; nothing is read yet.

    Args:
        shapes: of all parameters. trained: of those that are trained.
        mean_rows: embedding row -> rows whose mean initializes it.
        new_head_allowed: the folder may be another task's, whose head is left.
        share: (rank, ranks); each verifies its share of a checkpoint's files.
        lora: names the adapter folder to start from, if any.

    Raises:
        UserError: missing or unexpected tensors, other shapes, moments of another model, or other adapters.
    """
    wanted = {name: shape for name, shape in shapes.items() if not is_adapter(name)}
    # A model whose head is tied to the embedding has no such parameter; its folder may store one all the same.
    tied = frozenset({"lm_head.weight"}) - wanted.keys()
    with ExitStack() as stack:
        weights: StoredWeights = stack.enter_context(WithMeanRows(open_weights(folder, share=share), mean_rows))
        names = weights.match(wanted, tied, new_head_allowed)
        moments = None
        if trained == shapes:  # adapters and frozen weights have no moments in a folder
            moments = stack.enter_context(moments_beside(folder, shapes, new_head_allowed))
        if lora is not None and lora.init_from is not None:
            adapter = AdapterFolder(lora)
            # A trained head may be in it, too.
            names |= adapter.match(trained)
            weights = stack.enter_context(WithAdapter(weights, adapter))
        new_head = sorted(wanted.keys() - names.keys())
        yield InitialWeights(weights=weights, names=names, new_head=new_head, moments=moments)
