"""Datasets named by ``data.dataset``: an id of the Hugging Face hub, or a folder here. Each split becomes its files.

``datasets`` finds out which files a split has; it runs no code of a dataset. Our own readers read them, as any other
files: values keep their types, and an error names file and line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from gptj_train.errors import UserError
from gptj_train.near_name import near_name
from gptj_train.schema import schema

T = TypeVar("T")

Splits = dict[str, list[str]]
"""Name of a split -> its files, as paths or URLs."""


@schema
class DatasetKeys:
    """Which dataset, and which of its splits."""

    dataset: str | None
    subset: str | None
    split: str | None
    validation_split: str | None
    revision: str | None

    @property
    def splits_by_key(self) -> dict[str, str | None]:
        """Key of the group ``data`` -> the split whose files it gets; None leaves it as it is."""
        return {"train": self.split, "validation": self.validation_split}


def make_room(composed: DictConfig, given: set[str]) -> None:
    """Empty ``data.train`` and ``data.validation`` for the files of a dataset, before the config is typed.

    Args:
        given: the keys that the command line sets; those keep their values.
    """
    if OmegaConf.select(composed, "data.dataset") is None:
        return
    data = composed.data
    # Evaluation has data.train=null, and its dataset is for data.validation.
    trains = OmegaConf.is_missing(data, "train") or data.train is not None
    if trains and "data.train" not in given:
        data.train = []
    if data.validation_split is not None and "data.validation" not in given:
        data.validation = []


def with_dataset_files(config: T) -> T:
    """Return the config with the files of its dataset's splits as ``data.train`` and ``data.validation``.

    Raises:
        UserError: no such dataset, subset or split; files beside it; or a key that needs ``data.dataset``.
    """
    data = getattr(config, "data", None)
    if not isinstance(data, DatasetKeys):
        return config
    if data.dataset is None:
        for name in ("subset", "revision"):
            if getattr(data, name) is not None:
                raise UserError(f"data.{name}={getattr(data, name)}: it belongs to data.dataset=NAME")
        return config
    splits = _splits_of(data)
    files: dict[str, Any] = {}
    for name, split in data.splits_by_key.items():
        if split is None:
            continue
        if getattr(data, name):
            raise UserError(f"data.{name} and the split {split!r} of data.dataset are both given; drop one of them")
        if split not in splits:
            raise UserError(f"data.dataset={data.dataset}: no split {split!r}; there are {', '.join(sorted(splits))}")
        first, *others = files[name] = splits[split]
        if os.environ.get("RANK", "0") == "0":
            more = f" and {len(others):,} more" if others else ""
            print(f"data.{name}: split {split!r} of {data.dataset}: {first}{more}", flush=True)
    # The files are the record of what was read: those of the hub carry its commit.
    return replace(config, data=replace(data, dataset=None, subset=None, revision=None, **files))  # type: ignore[type-var]


def _splits_of(data: DatasetKeys) -> Splits:
    assert data.dataset is not None
    folder = Path(data.dataset)
    if not folder.is_dir():
        request = f"dataset {data.dataset} {data.subset} {data.revision}"
        return remembered(request, lambda: _described(data), said=f"data.dataset={data.dataset}")
    if data.revision is not None:
        raise UserError(f"data.revision={data.revision}: {folder} is a folder here, which has no revisions")
    saved = sorted(folder.glob("*/state.json"))
    if (folder / "state.json").is_file():
        return {"train": [str(folder)]}
    if (folder / "dataset_dict.json").is_file():
        return {state.parent.name: [str(state.parent)] for state in saved}
    splits = _described(data)
    home = os.path.realpath(folder)
    for files in splits.values():
        for file in files:
            # The folder's README says which files are its data, and may come from anywhere.
            if not Path(os.path.realpath(file)).is_relative_to(home):
                raise UserError(f"data.dataset={folder}: refused, its README names {file}, which is outside of it")
    return splits


def _described(data: DatasetKeys) -> Splits:
    """Return the files of each split, as the dataset's README or its file names say.

    Raises:
        UserError: no such dataset, subset or revision, no data in it, or no network.
    """
    # Imported here: it takes a second.
    from datasets import load_dataset_builder

    assert data.dataset is not None
    named = f"data.dataset={data.dataset}"
    is_local = os.path.isdir(data.dataset)
    try:
        builder = load_dataset_builder(data.dataset, data.subset, revision=data.revision)
    except ValueError as error:
        if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            raise UserError(f"{named}: choose data.subset ({_subsets(error)})") from None
        raise UserError(f"{named}: {_first_line(error)}") from None
    except Exception as error:  # no such dataset, no network, a bad README: each version has other errors
        where = "cannot be read" if is_local else f"{near_name(data.dataset)}no such folder here, and on the hub"
        raise UserError(f"{named}: {where} ({_first_line(error)})") from None
    found: Mapping[Any, list[str]] = builder.config.data_files or {}
    splits = {str(split): [str(file) for file in files] for split, files in found.items()}
    if not splits:
        raise UserError(f"{named}: no data files in it")
    for files in splits.values():
        for file in files:
            if not is_local and not file.startswith("hf://datasets/"):
                raise UserError(f"{named}: refused, its README names {file}, which is not of the hub")
    return splits


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _subsets(error: Exception) -> str:
    """Return the names in the message of an error about a subset that is missing or unknown."""
    _, bracket, names = str(error).partition("[")
    return f"there are {names.partition(']')[0]}" if bracket else _first_line(error)


def remembered(
    request: str, answer: Callable[[], T], *, said: str, still_holds: Callable[[T], bool] = lambda found: True
) -> T:
    """Return the answer to a request of the network; it is asked for once, and kept in the cache of ``datasets``.

    So a run that is resumed has the same files, and needs no network. The ranks of a host wait for the first one.

    Args:
        answer: returns what JSON can hold.
        said: key and value, for messages.
        still_holds: whether an earlier answer is of use.

    Raises:
        UserError: the cache cannot be written, or as ``answer``.
    """
    from datasets import config

    cache = Path(config.HF_DATASETS_CACHE) / "gptj_train"
    file = cache / f"{sha256(request.encode()).hexdigest()[:24]}.json"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if file.is_file():
                kept: T = json.loads(file.read_text())
                if still_holds(kept):
                    return kept
            found = answer()
            file.with_suffix(".part").write_text(json.dumps(found))
            os.replace(file.with_suffix(".part"), file)
            return found
    except OSError as error:
        raise UserError(f"{said}: cannot write into {cache} ({error.strerror}); set HF_DATASETS_CACHE") from None
