"""Start training from LoRA adapters that an earlier run, ours or PEFT's, has left in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Size, Tensor

from gptj_train.errors import UserError
from gptj_train.model.lora import LoraConfig
from gptj_train.untrusted_files import read_json
from gptj_train.weights.hf_reader import ADAPTER_LAYOUTS, HFWeights
from gptj_train.weights.stored import StoredWeights, is_adapter

_LARGEST_CONFIG = 1_000_000  # bytes; PEFT's have a thousand
PEFT_PREFIX = "base_model.model."
"""Before every name in an adapter file: the model inside PEFT's wrappers, as its state dict names it."""

# Settings of PEFT that change what an adapter computes, and the values that we compute.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "fan_in_fan_out": (False, None),
    "trainable_token_indices": (None,),
}


class AdapterFolder:
    """The adapters in ``lora.init_from``: a folder of PEFT or the ``adapter`` of a run.

    Raises:
        UserError: no adapter there, or one of other settings than ``lora``.
    """

    def __init__(self, lora: LoraConfig) -> None:
        assert lora.init_from is not None
        self.folder = Path(lora.init_from)
        _check_settings(self.folder, lora)
        self._files = HFWeights(self.folder, ADAPTER_LAYOUTS)

    def match(self, trained: Mapping[str, Size]) -> dict[str, str]:
        """Return the stored name of each trained parameter that the folder has.

        Raises:
            UserError: it lacks an adapter, has others, or tensors of another shape.
        """
        names = {}
        left = set(self._files.names())
        for name, shape in trained.items():
            stored = PEFT_PREFIX + name
            if stored not in left:
                if is_adapter(name):
                    raise UserError(
                        f"{self.folder} lacks {stored}: it has adapters of other matrices than lora.targets"
                    )
                continue  # a head that this run adds
            found, _ = self._files.shape_and_dtype(stored)
            if found != tuple(shape):
                raise UserError(f"{self.folder}: {stored} has shape {found}, this model needs {tuple(shape)}")
            names[name] = stored
            left.remove(stored)
        if left:
            raise UserError(f"{self.folder} has more than lora.targets ask for, such as {min(left)}")
        return names

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fill ``into`` as ``StoredWeights.read`` does."""
        self._files.read(name, start, into)

    def close(self) -> None:
        """Close the file."""
        self._files.close()


class WithAdapter(StoredWeights):
    """Base weights and, under the names of PEFT, an adapter folder's tensors."""

    def __init__(self, base: StoredWeights, adapter: AdapterFolder) -> None:
        self.folder, self._base, self._adapter = base.folder, base, adapter

    def names(self) -> list[str]:
        return self._base.names()

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        return self._base.shape_and_dtype(name)

    def tensor(self, name: str) -> Tensor:
        return self._base.tensor(name)

    def read(self, name: str, start: int, into: Tensor) -> None:
        source = self._adapter if name.startswith(PEFT_PREFIX) else self._base
        source.read(name, start, into)

    def close(self) -> None:
        self._adapter.close()


def _check_settings(folder: Path, lora: LoraConfig) -> None:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"lora.init_from={folder}: no adapter_config.json here; give a folder that PEFT can load")
    try:
        config: dict[str, Any] = dict(read_json(path, _LARGEST_CONFIG))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    for name, values in _PLAIN.items():
        if config.get(name, values[0]) not in values:
            raise UserError(f"{path}: {name} is {config[name]!r}, which is not offered; train new adapters")
    ours = {"r": ("rank", lora.rank), "lora_alpha": ("alpha", lora.alpha)}
    ours["use_rslora"] = ("rslora", lora.rslora)
    for name, (key, value) in ours.items():
        found = config.get(name, False if name == "use_rslora" else None)
        if found != value:
            raise UserError(f"{path}: {name} is {found}, and lora.{key} is {value}; set lora.{key}={found}")
    targets = config.get("target_modules")
    if isinstance(targets, list) and set(map(str, targets)) != set(lora.matrices):
        wanted = ",".join(sorted(map(str, targets)))
        raise UserError(f"{path}: target_modules are others than lora.targets; set lora.targets=[{wanted}]")
