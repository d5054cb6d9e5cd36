"""Models named by their id on the Hugging Face hub: downloaded once per host, and used as a folder from then on.

Only config, tokenizer and weights are fetched, never code, and of the weights safetensors where a repository has them.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from gptj_train.errors import UserError
from gptj_train.near_name import near_name
from gptj_train.schema import schema

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_KEYS = ("init_from", "checkpoint", "tokenizer")  # that may name a model of the hub
_SMALL = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
)
# The first kind that a repository has is taken, as in Transformers.
_WEIGHTS = (
    ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
)


@schema
class HubKeys:
    """The key that belongs to the ids of a config's models and tokenizers."""

    revision: str | None


def with_local_folders(config: T, *, weights: bool) -> T:
    """Return the config with the local folder in place of each hub id; others are returned as they are.

    Args:
        weights: fetch weights too, of all but the tokenizer.

    Raises:
        UserError: a model that cannot be fetched, or a ``revision`` of no hub id.
    """
    if not isinstance(config, HubKeys):
        return config
    return replace(config, **_local_folders(config, weights=weights))


def _local_folders(config: HubKeys, *, weights: bool) -> dict[str, str]:
    """Return key -> folder of each key that holds a hub id."""
    ids = {}
    for key in _KEYS:
        name = getattr(config, key, None)
        if name is not None and is_hub_id(name):
            ids[key] = name
    if config.revision is not None and not ids:
        raise UserError(f"revision={config.revision}: it belongs to a hub id, such as init_from=EleutherAI/gpt-j-6b")
    models = {name for key, name in ids.items() if key != "tokenizer"}
    folders = {}
    for key, name in ids.items():
        # A tokenizer of another repository than the model's has no such revision.
        has_revision = not models or name in models
        revision = config.revision if has_revision else None
        folders[key] = str(fetch(name, key, revision=revision, weights=weights and key != "tokenizer"))
    return folders


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form OWNER/NAME and is no path here."""
    return _ID.fullmatch(name) is not None and not os.path.exists(name)


def fetch(name: str, key: str, *, revision: str | None, weights: bool) -> Path:
    """Return the local folder of a model of the hub. What is not in the hub's cache is downloaded, with progress.

    The ranks of a host come here together: the first one downloads, and the others wait for its lock.

    Args:
        key: the config key that holds the name, for messages.
        revision: branch, tag or commit; None is the main branch.

    Raises:
        UserError: no such model or revision, no access, or no network.
    """
    # Imported here: it takes a while, and most runs name a folder.
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    said = f"{key}={name}"
    not_here = f"{said}: {near_name(name)}no such folder here"
    command = f"hf download {name} --local-dir {name.partition('/')[2]}"
    if revision is not None:
        command += f" --revision {revision}"
    cache = Path(constants.HF_HUB_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{name.replace('/', '--')}.gptj_train.lock"):
            info = HfApi().model_info(name, revision=revision)
            wanted = _wanted([sibling.rfilename for sibling in info.siblings or ()], weights=weights)
            # By its name, not by its commit: only so does the cache know the revision when there is no network.
            return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except GatedRepoError:
        raise UserError(
            f"{said}: the hub asks for an agreement first; accept it on the model's page, then 'hf auth login'"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"{not_here}, and no such model on the hub; correct it") from None
    except RevisionNotFoundError:
        raise UserError(f"{said}: the model has no revision {revision!r}; give a branch, tag or commit") from None
    except HFValidationError as error:
        raise UserError(f"{not_here}, and no valid id ({str(error).splitlines()[0]})") from None
    except Exception as error:  # no network: each version of the client has other errors for it
        folder = _from_cache(name, revision, weights=weights)
        if folder is None:
            lines = str(error).splitlines()
            reason = lines[0] if lines else type(error).__name__
            raise UserError(
                f"{not_here}, and the hub cannot be reached ({reason}); where there is a network, run "
                f"'{command}', and give that folder"
            ) from None
        print(f"{said}: the hub cannot be reached; taken from its cache, {folder}", flush=True)
        return folder


def _from_cache(name: str, revision: str | None, *, weights: bool) -> Path | None:
    """Return the folder in the hub's cache, if all of it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for kind in _WEIGHTS if weights else ((),):
        patterns = [*_SMALL, *kind]
        try:
            folder = snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True)
        except LocalEntryNotFoundError:
            continue
        files = os.listdir(folder)
        if not kind or any(fnmatch(file, pattern) for file in files for pattern in kind):
            return Path(folder)
    return None


def _wanted(files: list[str], *, weights: bool) -> list[str]:
    """Return the files of a repository that are needed."""
    wanted = [file for file in files if file in _SMALL]
    if weights:
        for kind in _WEIGHTS:
            found = [file for file in files if any(fnmatch(file, pattern) for pattern in kind)]
            if found:
                return wanted + found
    return wanted
