"""Training checkpoints as folders on disk: their manifest, its verification, and the weights inside."""

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

from gptj_train.errors import UserError
from gptj_train.weights.moments import MOMENTS
from gptj_train.weights.slices import Written, open_plain

MANIFEST = "manifest.json"
KINDS = ("master", *MOMENTS)
"""fp32 weights and AdamW's two moments of them; each rank writes one file of each."""

_FORMAT = 1
_LARGEST_MANIFEST = 100_000_000  # bytes
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_HASHING_THREADS = 4


def state_file(kind: str, rank: int, world_size: int) -> str:
    """Name of the file that a rank writes; ranks count from 0."""
    return f"{kind}-{rank + 1:05}-of-{world_size:05}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself. Hashes find accidents; who can write to the folder can also write them.

    ``state`` is the trainer's, ``optimizer`` the engine's; ``parameters`` has the shape of each by name.
    """

    state: dict[str, Any]
    optimizer: dict[str, Any]
    world_size: int
    parameters: dict[str, list[int]]
    files: dict[str, Written]
    version: str

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Of a folder whose files are all there in their full size; their contents are not looked at.

        Raises:
            UserError: no manifest, a damaged one, or files that do not agree with it.
        """
        path = folder / MANIFEST
        with os.fdopen(open_plain(path), "rb") as file:
            text = file.read(_LARGEST_MANIFEST)
        try:
            body = json.loads(text)
            if body.pop("sha256") != _digest(body):
                raise UserError("its own sha256 does not match")
            if body.pop("format") != _FORMAT:
                raise UserError(f"written by gptj_train {body['version']} in a format that this version does not know")
            body["files"] = {name: Written(**entry) for name, entry in body["files"].items()}
            manifest = cls(**body)
            if type(manifest.world_size) is not int or not 1 <= manifest.world_size <= len(manifest.files):
                raise UserError(f"world_size is {manifest.world_size!r}")
            for shape in manifest.parameters.values():
                torch.Size(shape)
            if absent := {name for kind in KINDS for name in manifest.of_kind(kind)} - manifest.files.keys():
                raise UserError(f"it has no {min(absent)}")
            if strange := [name for name in manifest.files if not _PLAIN_NAME.fullmatch(name)]:
                raise UserError(f"it names {strange[0]!r}, which is not a file of its folder")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: not a whole manifest ({error})") from None
        for name, entry in manifest.files.items():
            _check_size(folder / name, entry.bytes)
        return manifest

    def write(self, folder: Path) -> None:
        """Make it last; the folder counts from here on."""
        body = asdict(self) | {"format": _FORMAT}
        body["files"] = {name: entry._asdict() for name, entry in self.files.items()}
        with (folder / MANIFEST).open("x") as file:
            json.dump(body | {"sha256": _digest(body)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def of_kind(self, kind: str) -> list[str]:
        """The files of weights or of a moment, one for each rank that wrote."""
        return [state_file(kind, rank, self.world_size) for rank in range(self.world_size)]

    def damage(self, folder: Path, names: Iterable[str]) -> list[str]:
        """What is wrong with the contents of some of the files, a line each; reads them all."""
        with ThreadPoolExecutor(_HASHING_THREADS) as threads:
            lines = threads.map(lambda name: _damage(folder / name, self.files[name]), names)
            return [line for line in lines if line]


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _check_size(path: Path, expected: int) -> None:
    descriptor = open_plain(path)
    size = os.fstat(descriptor).st_size
    os.close(descriptor)
    if size != expected:
        raise UserError(f"{path}: damaged, it has {size} bytes, the manifest says {expected}")


def _damage(path: Path, entry: Written) -> str | None:
    try:
        _check_size(path, entry.bytes)
        with os.fdopen(open_plain(path), "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        return str(error)
    return None if found == entry.sha256 else f"{path}: damaged, its content does not have the manifest's sha256"
