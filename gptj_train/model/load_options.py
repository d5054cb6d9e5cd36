"""The keyword arguments of Transformers' from_pretrained, as far as they mean something on a local folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from gptj_train.errors import UserError
from gptj_train.model.config_names import ALIASES, nearest
from gptj_train.model.gptj_config import GPTJConfig

# They say how to find, download or read files, or how to spare memory; a local folder is found, and mapped, anyway.
_WITHOUT_EFFECT = {
    *("revision", "cache_dir", "force_download", "local_files_only", "token", "use_auth_token", "proxies"),
    *("resume_download", "mirror", "code_revision", "low_cpu_mem_usage", "weights_only", "use_safetensors"),
    *("attn_implementation", "offload_folder", "offload_state_dict", "offload_buffers", "max_memory"),
}
# Value by which each of these is absent. Any other value asks for something that is not offered here.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "trust_remote_code": ((None, False), "no code from a folder ever runs"),
    "quantization_config": ((None,), 'give quantize="nf4" or quantize="int8"'),
    "load_in_8bit": ((None, False), 'give quantize="int8"'),
    "load_in_4bit": ((None, False), 'give quantize="nf4"'),
    "output_loading_info": ((None, False), "a folder with missing or unexpected tensors is refused"),
    "state_dict": ((None,), "build the model from its config and call load_state_dict"),
    "from_tf": ((None, False), "convert the folder to safetensors with Transformers"),
    "from_flax": ((None, False), "convert the folder to safetensors with Transformers"),
    "gguf_file": ((None,), "convert the folder to safetensors with Transformers"),
    "variant": ((None,), "rename the files to model.safetensors"),
    "tp_plan": ((None,), "use ZeRO-3 or FSDP"),
    "subfolder": ((None, ""), "give the folder's own path"),
}


def split_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config fields among the options of ``from_pretrained``; say what has no effect, refuse the rest.

    Raises:
        UserError: an option that is not offered, or no option at all, with the nearest one.
    """
    changes = {}
    known = {entry.name for entry in fields(GPTJConfig)} | ALIASES.keys() | {"label2id"}
    ignored = []
    for name, value in options.items():
        if name in _WITHOUT_EFFECT:
            ignored.append(name)
        elif name in _REFUSED:
            absent, instead = _REFUSED[name]
            # By identity: 0 == False, and a tensor has no plain equality.
            if not any(value is other for other in absent):
                raise UserError(f"from_pretrained does not offer {name}={value!r}: {instead}")
        elif name in known:
            changes[name] = value
        else:
            raise UserError(
                f"from_pretrained has no {name!r}{nearest(name, known | _WITHOUT_EFFECT | _REFUSED.keys())}"
            )
    if ignored:
        logging.getLogger(__name__).warning("without effect on a local folder: %s", ", ".join(ignored))
    return changes


def requested_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that the caller asks for by either name; None, as "auto", keeps the stored one.

    Raises:
        UserError: no float dtype, or two different ones.
    """
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise UserError(f"dtype={dtype!r} contradicts torch_dtype={torch_dtype!r}; give dtype alone")
    asked = torch_dtype if dtype is None else dtype
    if asked is None or asked == "auto":
        return None
    found = getattr(torch, asked.removeprefix("torch."), None) if isinstance(asked, str) else asked
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype must be a float dtype such as 'bfloat16' or torch.bfloat16, got {asked!r}")
    return found


def requested_device(device_map: Any) -> torch.device | None:
    """Return the one device that ``device_map`` names; None means the CPU.

    Raises:
        UserError: a map over several devices, or the name of a strategy to make one.
    """
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map is None:
        return None
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise UserError(
            f"device_map={device_map!r} is not offered; name one device such as 'cuda', or load to the CPU "
            "and call accelerate.dispatch_model"
        ) from None
