"""Packings on disk: each is made once, and opened by later runs and other ranks in no time.

A packing is a folder in ``data.cache_dir``, beside the token stores, named by all that determines it:

* ``pieces.bin``: the pieces, window by window;
* ``windows.bin``: the first piece of each window;
* ``packing.json``: facts about the documents, and the sizes of the files. It is written last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptj_train.atomic_write import new_folder
from gptj_train.data.claims import lock_of
from gptj_train.data.held_out_share import HeldOutShare
from gptj_train.data.packing import PIECE, DocumentFacts, Method, Packing, pack
from gptj_train.data.store import TokenStore, mapped
from gptj_train.data.workers import cannot_write
from gptj_train.errors import UserError

FORMAT = 2
"""Part of every packing's name: raise it if the packing changes, so that no old one is reused."""

_FACTS = "packing.json"


class Part(NamedTuple):
    """A side of the documents: those that are held out by a rule, or the others."""

    rule: HeldOutShare
    held: bool


def open_packing(
    stores: Sequence[TokenStore],
    component: str | None,
    *,
    cache: Path,
    method: Method,
    length: int,
    part: Part | None = None,
) -> Packing:
    """Return the packing of some stores in memory-mapped files; a missing one is made first.

    Any number of processes may call this at once: the first one packs, and the others wait for its lock.

    Args:
        stores: whose folders are in ``cache``.
        component: see ``pack``, as ``method`` and ``length``.
        part: the documents to pack; None packs all.

    Raises:
        UserError: a full or read-only disk.
    """
    # A store's name stands for its content.
    names = [store.folder.name for store in stores]
    side = None if part is None else [part.rule.share, part.rule.seed, part.held]
    key = json.dumps([FORMAT, component, method, length, side, *names])
    folder = cache / f"packed_{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    if not _is_whole(folder):
        try:
            with lock_of(folder):
                # Look again: while this process waited for the lock, another one may have packed.
                if not _is_whole(folder):
                    own = None if part is None else _documents_of(part, stores)
                    _write(folder, pack(stores, component, method=method, length=length, own=own))
        except OSError as error:
            raise UserError(cannot_write(cache, error)) from None
    facts = DocumentFacts(**json.loads((folder / _FACTS).read_text())["facts"])
    pieces = mapped(folder / "pieces.bin", PIECE)
    first_piece = mapped(folder / "windows.bin", np.dtype(np.int64))
    return Packing(pieces, first_piece, facts)


def _is_whole(folder: Path) -> bool:
    """Return whether all files of a packing have the sizes that packing.json gives.

    Clusters that delete old files may leave a part of one: windows would lose pieces, or reading end the process.
    """
    try:
        sizes = json.loads((folder / _FACTS).read_text())["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _documents_of(part: Part, stores: Sequence[TokenStore]) -> np.ndarray:
    held = part.rule.split(np.concatenate([store.hashes for store in stores]))
    return held if part.held else ~held


def _write(folder: Path, packing: Packing) -> None:
    with new_folder(folder) as scratch:
        packing.pieces.tofile(scratch / "pieces.bin")
        packing.first_piece.astype(np.int64).tofile(scratch / "windows.bin")
        sizes = {path.name: path.stat().st_size for path in scratch.iterdir()}
        (scratch / _FACTS).write_text(json.dumps({"facts": asdict(packing.facts), "bytes": sizes}) + "\n")
