"""Keep secrets out of configs: config.yaml and Weights & Biases show every value of a config."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf

from gptj_train.errors import UserError

_SECRET_NAME = re.compile(
    r"(api|access|auth|private|secret|signing|encryption)_?key|token$|secret|pass(w(or)?d|phrase)?$|passw(or)?d"
    r"|credential|cookie|jwt|(^|_)pat$|(database|db|redis|mongo\w*|postgres\w*)_(url|uri)$|_dsn$",
    re.IGNORECASE,
)
_URL_WITH_PASSWORD = re.compile(r"\w+://[^\s/@:]*:[^\s/@]+@")
# Shorter values of secret variables, such as "1", occur in innocent text.
_SHORTEST_SECRET = 8

# Places, names and job numbers. Any other variable may hold a secret, whatever it is called.
_READABLE_VARIABLE = re.compile(
    r"HOME|USER|LOGNAME|HOSTNAME|PWD|SCRATCH|WORK|PROJECT|TMPDIR|LOCAL_SCRATCH|XDG_CACHE_HOME|HF_HOME"
    r"|CUDA_VISIBLE_DEVICES|RANK|WORLD_SIZE|LOCAL_RANK|SLURM_\w+|PBS_JOBID|LSB_JOBID"
)


def read_variable(name: str, *default: Any) -> Any:
    """Return an environment variable for ``${oc.env:NAME}`` or ``${oc.env:NAME,default}`` in a config.

    Raises:
        UserError: a variable that is not on the list of harmless ones, or one that is not set.
    """
    # SLURM_JWT is Slurm's own token.
    if not _READABLE_VARIABLE.fullmatch(name) or _SECRET_NAME.search(name):
        raise UserError(
            f"${{oc.env:{name}}} may be a secret, and the config is written to config.yaml and Weights & Biases; a "
            "config may read HOME, USER, SCRATCH, TMPDIR and SLURM_*, and libraries read the others themselves"
        )
    value = os.environ.get(name, *default)
    if value is None and not default:
        raise UserError(f"${{oc.env:{name}}} is not set")
    return value


# In place of OmegaConf's own, which reads every variable. A search of the config's text for forbidden names would not
# do: a name can be quoted, or be put together by other interpolations.
OmegaConf.register_new_resolver("oc.env", read_variable, replace=True)


def refuse_secrets(values: Any, plain_text_keys: set[str]) -> None:
    """Search a config for secrets: by the names of its keys, and by its values.

    Args:
        plain_text_keys: keys whose text may hold anything but the value of a secret variable, such as prompts.

    Raises:
        UserError: a key with a secret's name, a URL with a password, or the value of a secret variable.
    """
    secret_variables = dict(_secret_variables(os.environ))
    for key, value in _entries(values):
        if value is not None and _SECRET_NAME.search(key.rpartition(".")[2]):
            raise UserError(f"{key} looks like a secret; {_ADVICE}")
        if not isinstance(value, str):
            continue
        if key not in plain_text_keys and _URL_WITH_PASSWORD.search(value):
            raise UserError(f"{key} is a URL with a password; {_ADVICE}")
        for name, secret in secret_variables.items():
            # As a shell's $NAME leaves it.
            if secret in value:
                raise UserError(f"{key} contains the value of the environment variable {name}; {_ADVICE}")


_ADVICE = (
    "the config is written to config.yaml and Weights & Biases; leave secrets in the environment, where the libraries "
    "that need them look for them"
)


def _secret_variables(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, value in environment.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET:
            yield name, value


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and value of every entry, those of blocks and lists included."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _entries(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner, key)
    else:
        yield key, value
