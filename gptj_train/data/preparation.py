"""Tokenize files into token stores, each of them once; the stores are found again by later runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from gptj_train.atomic_write import SCRATCH_PATTERN, new_folder
from gptj_train.counted import counted
from gptj_train.data.claims import claim, lock_of_host
from gptj_train.data.file_parts import FilePart, parts_of
from gptj_train.data.formats import say
from gptj_train.data.progress import Progress
from gptj_train.data.store import FORMAT, TokenStore, damage_of
from gptj_train.data.text_config import DataConfig
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.data.workers import cannot_write, tokenize_file, tokenize_in_workers
from gptj_train.errors import UserError
from gptj_train.launch.host import usable_cores

_SMALL = 64 * 2**20  # bytes; this much is tokenized before worker processes have started
_POLL = 1.0  # seconds
_OPTIONS = (
    "kind",
    "text_field",
    "prompt_field",
    "response_field",
    "messages_field",
    "chat_template",
    "special_tokens",
    "component_field",
)
"""Keys of the config that determine what a file's store contains.

``bad_records`` is none of them: a store without skipped records is the same either way.
"""


def open_stores(files: list[Path], data: DataConfig, tokenizer: Tokenizer) -> list[TokenStore]:
    """Return the store of each file, or those of its parts if it is large; missing ones are made first.

    Any number of processes on any number of hosts may call this at once, without a process group: one process of each
    host works, and the others wait; the hosts share the files. A killed process leaves no store that looks complete.

    Raises:
        UserError: a bad record or file, too large a share of bad records, or no document at all.
    """
    cache = Path(data.cache_dir)
    parts = [part for file in files for part in parts_of(file)]
    folders = [_store_folder(part, data, tokenizer) for part in parts]
    if not all(_is_usable(folder, data) for folder in folders):
        # By folder: a file that is listed twice is tokenized once.
        part_of = dict(zip(folders, parts, strict=True))
        try:
            with lock_of_host(cache):
                _remove_leftovers(cache)
                _make_all(part_of, data, tokenizer)
        except OSError as error:
            raise UserError(cannot_write(cache, error)) from None
    stores = [TokenStore(folder) for folder in folders]
    _check(files, stores, data)
    return stores


def _remove_leftovers(cache: Path) -> None:
    """Remove what killed processes left, but not what another host is writing."""
    for leftover in cache.glob(SCRATCH_PATTERN):
        _, name, *_ = leftover.name.split(".")  # .NAME.RANDOM.tmp
        with claim(cache / name) as is_free:
            if is_free:
                shutil.rmtree(leftover, ignore_errors=True)


def _make_all(part_of: dict[Path, FilePart], data: DataConfig, tokenizer: Tokenizer) -> None:
    """Make the stores that are missing, and wait for those that other hosts make."""
    for folder in part_of:
        _announce_damage(folder)
    told = False
    while True:
        missing = {folder: part for folder, part in part_of.items() if not _is_usable(folder, data)}
        if not missing:
            return
        made = _make(missing, data, tokenizer)
        if made == 0:
            if not told:
                say(f"data: waiting for another host, which prepares {counted(len(missing), 'store')}")
                told = True
            time.sleep(_POLL)


def _store_folder(part: FilePart, data: DataConfig, tokenizer: Tokenizer) -> Path:
    """Return the folder of a file's store, named by all that determines its content.

    A file is identified by path, size and modification time: hashing terabytes at every start takes too long.
    """
    options = [getattr(data, name) for name in _OPTIONS]
    status = part.file.stat()
    identity = [os.path.abspath(part.file), status.st_size, status.st_mtime_ns]
    if part.end is not None:
        identity += [part.begin, part.end]
    key = json.dumps([FORMAT, tokenizer.digest, *options, *identity])
    digest = hashlib.sha256(key.encode()).hexdigest()
    return Path(data.cache_dir) / digest[:24]


def _is_usable(folder: Path, data: DataConfig) -> bool:
    """Return whether the store is complete; under bad_records=error, one that skipped records is not usable."""
    if not TokenStore.exists(folder):
        return False
    return data.bad_records == "skip" or not TokenStore(folder).skipped


def _announce_damage(folder: Path) -> None:
    damage = damage_of(folder)
    if damage and folder.exists():
        print(f"{folder}: damaged, {damage}; it is made again", file=sys.stderr, flush=True)


def _check(files: list[Path], stores: list[TokenStore], data: DataConfig) -> None:
    skipped = Counter[str]()
    documents = 0
    for store in stores:
        skipped.update(store.skipped)
        documents += len(store)
    share = skipped.total() / max(skipped.total() + documents, 1)
    if share > data.max_bad_share:
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in skipped.most_common())
        raise UserError(
            f"{_some_names(files)}: {share:.2%} of the records are bad ({reasons}), more than data.max_bad_share "
            f"({data.max_bad_share:.2%}); data.bad_records=error names the first of them"
        )
    if documents == 0:
        raise UserError(f"{_some_names(files)}: the data contain no text")


def _some_names(files: list[Path]) -> str:
    """Write the first three names, and how many more there are."""
    names = ", ".join(str(file) for file in files[:3])
    return names if len(files) <= 3 else f"{names} and {len(files) - 3:,} more"


def _make(missing: dict[Path, FilePart], data: DataConfig, tokenizer: Tokenizer) -> int:
    """Make those of the missing stores (folder -> its file or part) that no other host is making; return how many."""
    sizes = {folder: part.size for folder, part in missing.items()}
    total = sum(sizes.values())
    workers = min(len(missing), usable_cores()) if total > _SMALL else 1

    def is_missing(folder: Path) -> bool:
        return not _is_usable(folder, data)

    with Progress(total) as progress:
        if workers > 1:
            # The largest first: at the end no worker is left alone with a large file.
            largest_first = sorted(missing.items(), key=lambda job: -sizes[job[0]])
            return tokenize_in_workers(
                largest_first, data, tokenizer, workers=workers, progress=progress, is_missing=is_missing
            )
        # The tokenizer uses all cores by itself; one process gains from it as long as reading is not the limit.
        made = 0
        for folder, part in missing.items():
            with claim(folder) as is_free:
                # Look again: another host may have made it since.
                if is_free and is_missing(folder):
                    with new_folder(folder) as scratch:
                        tokenize_file(part, scratch, data, tokenizer, progress=progress)
                    made += 1
        return made
