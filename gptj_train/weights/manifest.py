"""A checkpoint's manifest.json: what the folder holds, with the size and hash of every file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gptj_train.atomic_write import write_text
from gptj_train.errors import UserError
from gptj_train.weights.moments import MOMENTS
from gptj_train.weights.safetensors_file import Written, open_plain

MANIFEST = "manifest.json"
KINDS = ("master", *MOMENTS)
"""fp32 weights and AdamW's two moments of them; each rank writes one file of each."""

_FORMAT = 1
_LARGEST_MANIFEST = 100_000_000  # bytes; one of GPT-J on 64 ranks has 100 thousand
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,200}")  # a file system takes 255 bytes
_COUNTS = ("step", "steps", "tokens", "skipped", "skipped_in_a_row", "evaluated", "best_step", "evaluations_since_best")
_TYPES: dict[str, tuple[type, ...]] = {
    "next_batch": (str, type(None)),
    "held_out": (str,),
    "wandb_id": (str, type(None)),
    "settings": (dict,),
    "data": (dict,),
    "best_metric": (str,),
    "best_value": (float, type(None)),
}
_LARGEST_COUNT = 2**62  # of anything; larger ones overflow in arrays
_HASHING_THREADS = 4  # hashing releases the GIL; beyond four the disk is the limit


def state_file(kind: str, rank: int, world_size: int) -> str:
    """Return the name of the file that a rank writes; ranks count from 0."""
    return f"{kind}-{rank + 1:05}-of-{world_size:05}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json.

    Its hashes find accidents, not attacks: who can change a file of the folder can change the manifest too.

    Attributes:
        state: the trainer's, without tensors.
        optimizer: the engine's step count and loss scale.
        world_size: ranks that wrote the checkpoint.
        parameters: the shape of each trained parameter by name.
        files: size and sha256 of every other file in the folder.
        version: of gptj_train.
    """

    state: dict[str, Any]
    optimizer: dict[str, Any]
    world_size: int
    parameters: dict[str, list[int]]
    files: dict[str, Written]
    version: str

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's manifest and check that every file is there in its full size; contents are not read.

        Raises:
            UserError: no manifest, a damaged one, or files that do not agree with it.
        """
        path = folder / MANIFEST
        with os.fdopen(open_plain(path), "rb") as file:
            text = file.read(_LARGEST_MANIFEST)
        # Even with a valid hash these are a stranger's values, of any type and size: whatever they break is one error.
        try:
            manifest = cls(**_checked_body(text))
            manifest._check_values()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: not a valid manifest ({error})") from None
        for name, entry in manifest.files.items():
            _check_size(folder / name, entry.bytes)
        return manifest

    def _check_values(self) -> None:
        # world_size first: of_kind counts up to it.
        if type(self.world_size) is not int or not 1 <= self.world_size <= len(self.files):
            raise UserError(f"world_size is {self.world_size!r}")
        _check_counts(self.state, least=-1)  # no evaluation yet is -1
        _check_counts({"steps": self.optimizer["steps"]}, least=0)
        if not isinstance(self.optimizer["loss_scale"], dict) or not isinstance(self.version, str):
            raise UserError("optimizer or version has another type")
        for shape in self.parameters.values():
            torch.Size(shape)  # raises for anything but a list of integers
        for kind in KINDS:
            for name in self.of_kind(kind):
                if name not in self.files:
                    raise UserError(f"it has no {name}")
        for name in self.files:
            if not _PLAIN_NAME.fullmatch(name):
                raise UserError(f"it names {name!r}, which is not a file of its folder")

    def write(self, folder: Path) -> None:
        """Write manifest.json; the folder counts as a checkpoint from here on."""
        body = asdict(self) | {"format": _FORMAT}
        body["files"] = {name: entry._asdict() for name, entry in self.files.items()}
        write_text(folder / MANIFEST, json.dumps(body | {"sha256": _hash_of(body)}, indent=1))

    def of_kind(self, kind: str) -> list[str]:
        """Return the files of weights or of a moment, one for each rank that wrote."""
        return [state_file(kind, rank, self.world_size) for rank in range(self.world_size)]

    def damage(self, folder: Path, names: Iterable[str]) -> list[str]:
        """Read some of the files whole, and return a line for each whose contents are not as recorded."""

        def find(name: str) -> str | None:
            return _find_damage(folder / name, self.files[name])

        with ThreadPoolExecutor(_HASHING_THREADS) as threads:
            return [line for line in threads.map(find, names) if line]


def _check_counts(values: dict[str, Any], least: int) -> None:
    """Check the whole numbers, texts and settings among the trainer's values, by their names."""
    for name, value in values.items():
        if name in _TYPES:
            if not isinstance(value, _TYPES[name]):
                raise UserError(f"{name} is {value!r}")
        elif name == "schedule":
            _check_schedule(value)
        elif name in _COUNTS and (type(value) is not int or not least <= value <= _LARGEST_COUNT):
            raise UserError(f"{name} is {value!r}")


def _check_schedule(cycles: Any) -> None:
    """Check the cycles of the learning rate: [start, end] each, in steps, the first from 0 on."""
    is_valid = isinstance(cycles, list)
    for number, cycle in enumerate(cycles):
        start, end = cycle
        is_whole = type(start) is int and type(end) is int
        is_valid = is_valid and is_whole and 0 <= start <= end <= _LARGEST_COUNT and (number > 0 or start == 0)
    if not is_valid:
        raise UserError(f"schedule is {cycles!r}")


def _checked_body(text: bytes) -> dict[str, Any]:
    """Parse a manifest and return the fields of ``Manifest``."""
    body: dict[str, Any] = json.loads(text)
    if body.pop("sha256") != _hash_of(body):
        raise UserError("its own sha256 does not match")
    if body.pop("format") != _FORMAT:
        raise UserError(f"written by gptj_train {body['version']} in a format that this version does not know")
    body["files"] = {name: Written(**entry) for name, entry in body["files"].items()}
    return body


def _hash_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _check_size(path: Path, expected: int) -> None:
    descriptor = open_plain(path)
    size = os.fstat(descriptor).st_size
    os.close(descriptor)
    if size != expected:
        raise UserError(f"{path}: damaged, it has {size} bytes, the manifest says {expected}")


def _find_damage(path: Path, entry: Written) -> str | None:
    try:
        # The size again: the file may have changed since the manifest was read, and hashing takes minutes.
        _check_size(path, entry.bytes)
        with os.fdopen(open_plain(path), "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        return str(error)
    return None if found == entry.sha256 else f"{path}: damaged, its content does not have the manifest's sha256"
