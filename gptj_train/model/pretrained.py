"""The base class of the trunk and of every task head: reads and writes Transformers folders."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from gptj_train.atomic_write import scratch_folder
from gptj_train.errors import UserError
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.layers import Linear
from gptj_train.model.load_options import requested_device, requested_dtype, split_options
from gptj_train.model.outputs import ModelOutput
from gptj_train.model.quantized import Quantization, QuantizedMatrix, is_quantized, quantize_blocks
from gptj_train.model.transformers_names import TransformersNames
from gptj_train.weights.checkpoint_weights import open_weights
from gptj_train.weights.hf_writer import MAX_SHARD_BYTES, install_model, write_weights
from gptj_train.weights.stored import StoredWeights, is_finite

_logger = logging.getLogger(__name__)

OutputT = TypeVar("OutputT", bound=ModelOutput)


class PreTrained(TransformersNames):
    """A module built from a GPTJConfig, with ``from_pretrained`` and ``save_pretrained``.

    Attributes:
        new_head_allowed: weights of another task may initialize this model; its head then keeps its fresh weights.
        tied_names: the two names of the weight that ``tie_word_embeddings`` makes one; nothing without such.
    """

    new_head_allowed = False
    tied_names: tuple[str, ...] = ()

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.config = config
        self.name_or_path = ""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | str | None = None,
        *,
        config: GPTJConfig | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        ignore_mismatched_sizes: bool = False,
        quantize: Quantization = "none",
        **options: Any,
    ) -> Self:
        """Read a Transformers folder or a training checkpoint into a model in eval mode.

        The weights may be safetensors or ``pytorch_model.bin``, sharded or not.

        Args:
            folder: a local folder.
            dtype, torch_dtype: of the parameters, such as torch.float16 or "float16"; None and "auto" keep the stored
                one. Of several stored ones, the config's counts.
            config: replaces the folder's config.
            device_map: one device, such as "cuda"; None leaves the model on the CPU.
            ignore_mismatched_sizes: give a stored head of another size fresh weights, as for another number of labels.
            quantize: "nf4" or "int8" stores the matrices of the blocks in so many bits, each as it is read; the model
                cannot be saved, and trains only what is added to it.
            **options: fields of the config under any of their names (``num_labels=5``), and options of
                Transformers: what has no effect here is logged.

        Raises:
            UserError: a folder without a GPT-J config or weights, weights that do not match the config, an option
                that is not offered, or ``quantize`` without bitsandbytes.
        """
        dtype = requested_dtype(dtype, torch_dtype)
        device = requested_device(device_map)
        config = _config_of(folder, config, split_options(options))
        with open_weights(folder) as weights:
            if config.tie_word_embeddings and _stored_apart(weights, cls.tied_names):
                _logger.warning("%s and %s differ in the folder: they stay two, untied", *cls.tied_names)
                config.tie_word_embeddings = False
            # Without memory and initialization: every parameter but a new head is replaced below.
            with torch.device("meta"):
                model = cls(config)
            shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
            unread = set(cls.tied_names[:1]) if config.tie_word_embeddings else set()
            if ignore_mismatched_sizes and cls.new_head_allowed:
                unread |= _mismatched_head(weights, shapes)
            stored_names = weights.match(shapes, frozenset(unread), model.new_head_allowed)
            if dtype is None:
                dtype = _common_dtype(weights, stored_names.values(), config)
            tensors = {}
            for name, stored_name in stored_names.items():
                if quantize != "none" and is_quantized(name):
                    continue
                stored = weights.tensor(stored_name)
                weights.check_finite(stored_name, stored)
                tensors[name] = stored.to(dtype)
                if dtype == torch.float16 and not is_finite(tensors[name]):
                    raise UserError(f"{folder}: {stored_name} has values beyond fp16's range; take bf16 or fp32")
            if quantize != "none":
                compute_dtype = next(iter(tensors.values())).dtype

                def read(name: str) -> Tensor:
                    return weights.read_whole(stored_names[name], compute_dtype)

                quantize_blocks(model, quantize, read)
        # assign: the parameters become these tensors, memory-mapped files included, instead of copies of them.
        model.load_state_dict(tensors, strict=False, assign=True)
        missing = shapes.keys() - stored_names.keys()
        if missing:
            loaded_dtype = next(iter(tensors.values())).dtype
            _initialize_head(model, missing, config.initializer_range, loaded_dtype)
        # Assigning gave the two names of a tied weight one parameter each.
        model.tie_weights()
        model.name_or_path = str(folder)
        model._read_generation_config(folder)
        return model.requires_grad_().eval().to(device)

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | str | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        *,
        max_shard_size: int | str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
    ) -> None:
        """Write config.json, safetensors that Transformers loads, and generation_config.json of a model that generates.

        An existing folder keeps its other files; its weights and config are replaced once the new ones are complete.

        Args:
            folder: created with its parents.
            dtype: of the written tensors; None keeps each parameter's own.
            max_shard_bytes, max_shard_size: size above which the weights are split into several files; the second
                one, Transformers' name, also takes "5GB".
            state_dict: tensors to write in place of the parameters of the same names, as gathered by FSDP.
            is_main_process: False writes nothing: one of several ranks writes for all.

        Raises:
            UserError: a request for another format or for an upload.
            OSError: no space left, or the folder cannot be written; it then keeps its earlier files.
        """
        if push_to_hub or not safe_serialization:
            raise UserError("save_pretrained writes safetensors into a local folder, and nothing else")
        if not is_main_process:
            return
        if any(isinstance(module, QuantizedMatrix) for module in self.modules()):
            raise UserError("a quantized model cannot be saved; keep the folder that it was read from")
        target = Path(folder)
        given = state_dict or {}
        parameters = {name: given.get(name, parameter) for name, parameter in self.named_parameters()}
        wanted = requested_dtype(dtype, None)
        dtypes = {name: wanted or parameter.dtype for name, parameter in parameters.items()}
        # Wide elements first: each tensor then starts at a multiple of its element's size.
        names = sorted(parameters, key=lambda name: -dtypes[name].itemsize)
        shapes = {name: parameters[name].shape for name in names}
        tensors = ((name, parameters[name]) for name in names)
        limit = max_shard_bytes if max_shard_size is None else _bytes_of(max_shard_size)
        with scratch_folder(target) as finished:
            write_weights(finished, tensors, shapes, dtype=dtypes, max_shard_bytes=limit)
            self.config.dtype = str(wanted or self.dtype).removeprefix("torch.")
            self.config.save_pretrained(finished, architecture=type(self).__name__)
            self._write_generation_config(finished)
            install_model(finished, target)

    def _read_generation_config(self, folder: str | Path) -> None:
        """Read the options of ``generate``; a class without it has none."""

    def _write_generation_config(self, folder: Path) -> None:
        """Write the options of ``generate``; a class without it has none."""

    def _as_requested(self, output: OutputT, return_dict: bool | None) -> OutputT | tuple[Any, ...]:
        """Return the output itself or its tuple; None asks the config."""
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()


def _initialize_head(model: nn.Module, missing: set[str], std: float, dtype: torch.dtype) -> None:
    """Give a head that the folder lacks, being of another task, fresh weights."""
    _logger.warning("new head, not in the folder: %s", ", ".join(sorted(missing)))
    for name, child in model.named_children():
        if f"{name}.weight" not in missing:
            continue
        assert isinstance(child, Linear)
        has_bias = child.bias is not None
        # Built anew rather than filled: the meta device gave it no memory.
        fresh = Linear(child.in_features, child.out_features, std, bias=has_bias)
        setattr(model, name, fresh.to(dtype))


def _config_of(folder: str | Path, given: Any, changes: dict[str, Any]) -> GPTJConfig:
    """Return the folder's config or a copy of the given one, ours or Transformers', with changes."""
    if given is None:
        return GPTJConfig.from_pretrained(folder, **changes)
    config = replace(given) if isinstance(given, GPTJConfig) else GPTJConfig.from_dict(given.to_dict())
    for name, value in changes.items():
        setattr(config, name, value)
    # Built anew, because assignments are not checked.
    return replace(config)


def _stored_apart(weights: StoredWeights, tied_names: tuple[str, ...]) -> bool:
    """Return whether a folder holds both names of a tied weight, with different values."""
    if not tied_names or not set(tied_names) <= set(weights.names()):
        return False
    first, second = tied_names
    return not torch.equal(weights.tensor(first), weights.tensor(second))


def _mismatched_head(weights: StoredWeights, shapes: Mapping[str, torch.Size]) -> set[str]:
    """Return all head parameters if a stored one has another shape than the model's."""
    head = {name for name in shapes if not name.startswith("transformer.")}
    for name in head & set(weights.names()):
        shape, _ = weights.shape_and_dtype(name)
        if shape != tuple(shapes[name]):
            return head
    return set()


def _common_dtype(weights: StoredWeights, names: Iterable[str], config: GPTJConfig) -> torch.dtype | None:
    """Return the dtype for a folder that stores several: a product of two dtypes would fail. None for a single one."""
    stored = list(names)
    if len({weights.shape_and_dtype(name)[1] for name in stored}) == 1:
        return None
    dtype = requested_dtype(config.dtype, None) or weights.tensor(stored[0]).dtype
    _logger.warning("the folder mixes dtypes; all weights are loaded as %s (give dtype to choose)", dtype)
    return dtype


def _bytes_of(size: int | str) -> int:
    """Read a size such as 5000000, "5GB" or "500MiB"."""
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"(\d+) ?([KMG]?)(i?)B?", size.strip(), re.IGNORECASE)
    if found is None:
        raise UserError(f"max_shard_size must be a number of bytes or a size such as '5GB', got {size!r}")
    number, unit, binary = found.groups()
    base = 1024 if binary else 1000
    power = " KMG".index(unit.upper() or " ")
    return int(number) * int(base**power)
