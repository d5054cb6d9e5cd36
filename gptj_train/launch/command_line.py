"""Compose a recipe's typed config from the command line, with Hydra, and run Hydra's own switches."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gptj_train.errors import UserError
from gptj_train.launch.datasets_by_name import make_room
from gptj_train.launch.exit_codes import EXIT_DONE
from gptj_train.launch.key_help import help_lines
from gptj_train.launch.spelling import check_spelling
from gptj_train.launch.sweep import Job, Sweep
from gptj_train.schema import list_keys, plain_text_keys, text_keys, unknown_key_message, validated

T = TypeVar("T")

HELP = ("--help", "-h")

CONFIGS = Path(__file__).parents[1] / "configs"
"""The package's own configs, so that a recipe runs from any directory and as a copy."""

# A value that the user has already quoted for Hydra: 'a, b' or "a, b", with escaped quotes inside.
_QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""")
# A value that can only be one element of a list.
_ONE_NAME = re.compile(r"[\w./-]+")
# The start of an interpolation, and the backslashes before it, which OmegaConf reads as escapes.
_INTERPOLATION = re.compile(r"(\\*)\$\{")


def compose(primary: str, arguments: Sequence[str], cls: type[T]) -> T:
    """Compose ``configs/<primary>.yaml`` with the overrides of the command line, as a ``cls``.

    Args:
        arguments: overrides, and ``--config-dir DIR`` for a folder of the user's own presets and groups.

    Raises:
        UserError: an override that cannot be parsed, or that names no key or choice; wrong or missing values.
    """
    own_configs, overrides = split_config_dir(arguments)
    check_spelling(overrides, primary, cls, CONFIGS)
    overrides = [_quote_text(override, cls) for override in overrides]
    composed = _composed(primary, overrides, own_configs, cls)
    given = {}
    for override in overrides:
        key, _, value = override.partition("=")
        given[key.lstrip("+~")] = value
    make_room(composed, set(given))
    adjust = getattr(cls, "adjust", None)
    if adjust is not None:
        adjust(composed, given)
    return validated(composed, cls)


def split_config_dir(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Separate ``--config-dir DIR`` from the other arguments.

    Raises:
        UserError: no such folder.
    """
    # Hydra's compose() has no such option. Everything else is for Hydra: no --help here, no abbreviations.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", type=Path)
    # Not as an option of the parser, which would take Hydra's -c for an abbreviation of it.
    spelled_out = ["--config-dir" if argument == "-cd" else argument for argument in arguments]
    known, others = parser.parse_known_args(spelled_out)
    if known.config_dir is not None and not known.config_dir.is_dir():
        raise UserError(f"--config-dir {known.config_dir}: no such folder; give the folder that holds config/NAME.yaml")
    return known.config_dir, others


def run_hydra(script: Path, primary: str, cls: type) -> int:
    """Run Hydra's own switches (--cfg, --multirun and the like), and return the exit code.

    Raises:
        UserError: as ``compose``.
    """
    _, overrides = split_config_dir(sys.argv[1:])
    check_spelling(overrides, primary, cls, CONFIGS)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # without it Hydra prints its errors itself and exits with 1
    sweep = Sweep()
    folders: list[Path] = []

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=primary)
    def run_job(composed: DictConfig) -> None:
        # A new process for each job of a sweep: a process group cannot be started twice.
        settings = HydraConfig.get()
        number = settings.job.num
        command = [sys.executable, str(script), *settings.overrides.task]
        own_configs, _ = split_config_dir(sys.argv[1:])
        if own_configs is not None:
            command += ["--config-dir", str(own_configs)]
        folder = None
        if composed.get("output_dir"):
            folders.append(Path(composed.output_dir))
            # Otherwise the second job would resume the first one's run.
            folder = folders[0] / str(number)
            command.append(f"output_dir={folder}")
        # What the command line gives to all jobs needs no column in the table.
        own = [override for override in settings.overrides.task if override not in overrides]
        sweep.run(Job(number, own or list(settings.overrides.task), folder), command)

    try:
        run_job()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(_explain(error, cls)) from None
    return sweep.finish(folders[0] if folders else None) if sweep.jobs else EXIT_DONE


def print_help(primary: str, arguments: Sequence[str], cls: type) -> None:
    """Print a recipe's own keys with their values and comments; overrides beside --help show in the values.

    Raises:
        UserError: as ``compose``.
    """
    own_configs, overrides = split_config_dir(arguments)
    overrides = [_quote_text(override, cls) for override in overrides if override not in HELP]
    check_spelling(overrides, primary, cls, CONFIGS)
    composed = _composed(primary, overrides, own_configs, cls, with_hydra=True)
    choices = composed.hydra.runtime.choices
    values = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(values, dict)
    del values["hydra"]
    print("\n".join(help_lines(primary, CONFIGS, values, choices)))  # type: ignore[arg-type]


def _composed(
    primary: str, overrides: list[str], own_configs: Path | None, cls: type, with_hydra: bool = False
) -> DictConfig:
    if own_configs is not None:
        overrides = [*overrides, f"hydra.searchpath=['file://{own_configs.absolute()}']"]
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra.compose(primary, overrides=overrides, return_hydra_config=with_hydra)
    # Hydra raises all of them; OSError for the name of a config that is too long for a file.
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        raise UserError(_explain(error, cls)) from None


def _quote_text(override: str, cls: type) -> str:
    """Quote the value of a text key, in which Hydra's grammar would otherwise find commas, braces or numbers.

    The value of a plain text key, such as a prompt, is taken to the letter, but for null and quotes around it.
    """
    prefixed_key, _, value = override.partition("=")
    key = prefixed_key.lstrip("+")
    if key in list_keys(cls) and _ONE_NAME.fullmatch(value) and value != "null":
        # tasks=piqa means the same as tasks=[piqa].
        return f"{prefixed_key}=[{value}]"
    if key not in text_keys(cls) or value in ("", "null", "???") or _QUOTED.fullmatch(value):
        return override
    if key in plain_text_keys(cls):
        # Each backslash doubled, then one for the interpolation itself.
        value = _INTERPOLATION.sub(lambda match: match[1] * 2 + r"\${", value)
    elif value.startswith(("[", "${")):  # a list or an interpolation, which Hydra parses
        return override
    return f"{prefixed_key}={QuotedString(text=value, quote=Quote.single).with_quotes()}"


def _explain(error: Exception, cls: type) -> str:
    """Return the user's line for an error of Hydra, OmegaConf or YAML."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if group == "data":
            return f"data={name}: files are data.train=FILES and data.validation=FILES"
        if group.split("/")[0] == "model":
            known = ", ".join(error.options)
            return f"no model named {name!r}; there are: {known}. These are shapes; weights are init_from=..."
        near = get_close_matches(name, error.options, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        return f"no {group or 'config'} named {name!r}; {guess}there are: {', '.join(error.options)}"
    # Hydra only mentions the key in its message; OmegaConf's error, its cause, has it as a field.
    unknown_key = getattr(error.__cause__, "full_key", None)
    if unknown_key:
        return unknown_key_message(unknown_key, cls)
    # A group that the recipe does not have, such as model=gpt2 of recipes/generate.py.
    no_group = re.match(r"Could not override '([^']+)'", str(error))
    if no_group:
        return unknown_key_message(no_group[1], cls)
    ambiguous = re.match(r"Ambiguous value for argument '(.*?)=(.*)'", str(error))
    if ambiguous:
        key, value = ambiguous.groups()
        if key not in text_keys(cls) | list_keys(cls):
            return f"{key}={value}: several values; for a list write '{key}=[{value}]', for a sweep add --multirun"
        text = shlex.quote(f'{key}="{value}"')
        return f"'{key}={value}' may be a list, {key}=[{value}], or a text with a comma, {text}"
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        if not value:
            return f"{error.override!r} cannot be read; write key=value"
        if value.startswith("[") and value.endswith("]"):
            elements = ", ".join(f'"{element.strip()}"' for element in value[1:-1].split(","))
            return f"{error.override!r} cannot be read; quote the elements, {shlex.quote(f'{key}=[{elements}]')}"
        quoted = shlex.quote(f'{key}="{value}"')
        return f"{error.override!r} cannot be read; quote the value, {quoted}, or write a list, '{key}=[a, b]'"
    # From "full_key:" on OmegaConf's message describes its internals.
    return f"the command line or config cannot be read: {str(error).partition('full_key:')[0]}"
