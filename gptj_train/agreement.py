"""Check before the first step that all ranks run the same job, on the same files, into one shared folder."""

from __future__ import annotations

import hashlib
import itertools
import platform
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gptj_train.data.sampler import fingerprint
from gptj_train.environment import package_versions
from gptj_train.errors import UserError
from gptj_train.launch.ranks import rank, world_size
from gptj_train.tasks.task import Task
from gptj_train.weights.fingerprint import folder_fingerprint

# Paths may have other names on another host: their content is compared, or, for output_dir, that they are one folder.
# data.cache_dir may be each host's own, and nvme_path always is.
_PATHS = (
    *("output_dir", "init_from", "lora.init_from", "tokenizer", "data.cache_dir", "engine.nvme_path"),
    *("data.train", "data.validation", "data.forgetting"),
)

# The data's facts count documents and tokens; the content of some batches tells data of equal size apart.
_HASHED_STEPS = (0, 1000)
_MOST_NAMED = 5  # differences in a message
_LONGEST_VALUE = 40  # characters of a value in a message

# Seconds. An NFS client may believe for so long that a folder has not changed; listing it makes most of them look.
_UNTIL_VISIBLE = 30.0
_ABSENT = "absent"


@dataclass
class RankFacts:
    """What a rank is about to run: values by name, to be compared with those of the other ranks."""

    rank: int
    host: str
    values: dict[str, str]


def check_agreement(config: Mapping[str, Any], *, tokenizer: str, task: Task, facts: Mapping[str, str]) -> None:
    """Compare what the ranks are about to run, and prove that ``output_dir`` is one folder. Collective.

    Compared are the config, the code, the versions of packages, and the content of tokenizer, ``init_from``, adapters
    and data.

    Args:
        config: the run's config as nested dicts.
        tokenizer: digest of the tokenizer.
        facts: facts about data and batch by short name.

    Raises:
        UserError: on all ranks, with one line that names the hosts and what differs.
    """
    values = _flat(config)
    for name, fact in facts.items():
        # A fact with a key's name, such as epochs, follows from the keys and the data, which are compared.
        values.setdefault(name, fact)
    values["training and held-out batches"] = _batches(task)
    values["the tokenizer"] = tokenizer
    for key, folder in (("init_from", config["init_from"]), ("lora.init_from", config["lora"]["init_from"])):
        if folder is not None:
            values[f"the files of {key}"] = folder_fingerprint(folder)
    values["the code of gptj_train and the recipe"] = _code()
    values |= {"Python": platform.python_version(), **package_versions()}
    difference = find_difference(_gathered(RankFacts(rank(), socket.gethostname(), values)))
    if difference:
        raise UserError(difference)
    _check_shared(str(config["output_dir"]))


def find_difference(ranks: Sequence[RankFacts]) -> str:
    """Return one line that names hosts and values that differ; empty if there is no difference."""
    differences = []
    for name in dict.fromkeys(itertools.chain.from_iterable(facts.values for facts in ranks)):
        holders: dict[str, list[RankFacts]] = {}
        for facts in ranks:
            holders.setdefault(facts.values.get(name, _ABSENT), []).append(facts)
        if len(holders) > 1:
            texts = [f"{_short(value)} on {_places(some, ranks)}" for value, some in holders.items()]
            differences.append(f"{name}: {', '.join(texts)}")
    if not differences:
        return ""
    return (
        f"the ranks do not run the same job. {_listed(differences)}. "
        "Give every host the same command, code, packages and files"
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return dotted key -> value, without paths."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif prefix + key not in _PATHS:
            flat[prefix + key] = str(value)
    return flat


def _batches(task: Task) -> str:
    """Return a hash of some global batches and the first held-out one."""
    batches = []
    for step in _HASHED_STEPS:
        batches += task.training_batches(step, rank=0, world_size=1)
    batches += [batch.inputs for batch in itertools.islice(task.evaluation_batches(rank=0, world_size=1), 1)]
    return fingerprint(batches)


def _code() -> str:
    """Return a hash of the package's and the recipe's source, configs included."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    files = [path for path in sorted(package.rglob("*")) if path.suffix in (".py", ".yaml")]
    for path in files:
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    recipe = Path(sys.argv[0])
    if recipe.is_file():
        digest.update(recipe.read_bytes())
    return digest.hexdigest()


def _listed(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - _MOST_NAMED} more" if len(texts) > _MOST_NAMED else ""
    return "; ".join(texts[:_MOST_NAMED]) + more


def _short(value: str) -> str:
    if len(value) == 64 and " " not in value:
        return value[:8]  # a hash
    return value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}..."


def _places(some: Sequence[RankFacts], ranks: Sequence[RankFacts]) -> str:
    """Name hosts, or the single ranks of a host whose other ranks are not among them."""
    numbers = {facts.rank for facts in some}
    names: dict[str, None] = {}
    for facts in some:
        whole = all(other.rank in numbers for other in ranks if other.host == facts.host)
        names[facts.host if whole else f"{facts.host} (rank {facts.rank})"] = None
    return ", ".join(names)


def _check_shared(output_dir: str) -> None:
    """Prove that a folder is the same on all hosts, by a file that rank 0 writes and every rank looks for.

    Without this, ranks with folders of their own would train to the end and leave no whole checkpoint.
    """
    name = f".shared.{secrets.token_hex(8)}.tmp"
    failure = ""
    if rank() == 0:
        try:
            (Path(output_dir) / name).write_text("")
        except OSError as error:
            failure = f"output_dir={output_dir} cannot be written: {error.strerror}; free the disk, or give another one"
    name, failure = _gathered((name, failure))[0]
    if failure:
        raise UserError(failure)
    sees = _gathered((socket.gethostname(), _appears(Path(output_dir) / name)))
    if rank() == 0:
        (Path(output_dir) / name).unlink(missing_ok=True)
    blind = [f"rank {number} on {host}" for number, (host, found) in enumerate(sees) if not found]
    if blind:
        raise UserError(
            f"output_dir={output_dir} is not one folder for all ranks: {_listed(blind)} cannot see the file that "
            f"rank 0 wrote on {sees[0][0]}; mount the shared disk there, or give an output_dir on a disk that all "
            "hosts share"
        )


def _appears(path: Path) -> bool:
    ends = time.monotonic() + _UNTIL_VISIBLE
    while not path.exists():
        if time.monotonic() > ends:
            return False
        time.sleep(0.2)
        for folder in (path.parent.parent, path.parent):
            if folder.is_dir():
                next(folder.iterdir(), None)
    return True


def _gathered(row: Any) -> list[Any]:
    rows: list[Any] = [None] * world_size()
    dist.all_gather_object(rows, row)
    return rows
