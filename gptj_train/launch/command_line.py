"""From the command line to a recipe's typed config, by Hydra."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gptj_train.errors import UserError
from gptj_train.schema import plain_text_keys, text_keys, unknown_key_message, validated

T = TypeVar("T")

CONFIGS = Path(__file__).parents[1] / "configs"
"""The package's own configs, so that a recipe runs from any directory and as a copy."""

# A value that the user has quoted for Hydra: 'a, b' or "a, b", with escaped quotes inside.
_QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""")


def compose(primary: str, arguments: Sequence[str], cls: type[T]) -> T:
    """Compose ``configs/<primary>.yaml`` with the overrides of the command line, as a ``cls``.

    Args:
        arguments: overrides, and ``--config-dir DIR`` for a folder of the user's own presets and groups.

    Raises:
        UserError: an override that cannot be parsed, or that names no key or choice; wrong or missing values.
    """
    own_configs, overrides = split_config_dir(arguments)
    overrides = [_quote_text(override, cls) for override in overrides]
    if own_configs is not None:
        overrides.append(f"hydra.searchpath=['file://{own_configs.absolute()}']")
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = hydra.compose(primary, overrides=overrides)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:  # Hydra raises all four
        raise UserError(_explain(error, cls)) from None
    return validated(composed, cls)


def split_config_dir(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Separate ``--config-dir DIR`` from the other arguments.

    Raises:
        UserError: no such folder.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    known, others = parser.parse_known_args(list(arguments))
    if known.config_dir is not None and not known.config_dir.is_dir():
        raise UserError(f"--config-dir {known.config_dir}: no such folder; give the folder that holds config/NAME.yaml")
    return known.config_dir, others


def run_hydra(script: Path, primary: str, cls: type) -> None:
    """Run Hydra's own switches: --help, --cfg, --multirun and the like.

    Raises:
        UserError: as ``compose``.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # without it Hydra prints its errors itself and exits with 1

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=primary)
    def sweep(composed: DictConfig) -> None:
        # Each job of a sweep runs in its own process: a process group cannot be started twice.
        settings = HydraConfig.get()
        command = [sys.executable, str(script), *settings.overrides.task]
        own_configs, _ = split_config_dir(sys.argv[1:])
        if own_configs is not None:
            command += ["--config-dir", str(own_configs)]
        if output_dir := composed.get("output_dir"):
            command.append(f"output_dir={output_dir}/{settings.job.num}")
        if code := subprocess.run(command, check=False).returncode:
            sys.exit(code)

    try:
        sweep()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(_explain(error, cls)) from None


def _quote_text(override: str, cls: type) -> str:
    """Quote the value of a text key, in which Hydra's grammar would otherwise find commas, braces or numbers."""
    key, _, value = override.partition("=")
    key = key.lstrip("+")
    if key not in text_keys(cls) or value in ("", "null", "???"):
        return override
    # Hydra itself parses lists, interpolations and what is already quoted.
    if value.startswith(("[", "${")) or _QUOTED.fullmatch(value):
        return override
    quoted = QuotedString(text=value, quote=Quote.single).with_quotes()
    if key in plain_text_keys(cls):
        quoted = quoted.replace("${", "\\${")
    return override[: override.index("=") + 1] + quoted


def _explain(error: Exception, cls: type) -> str:
    """Return one line on an error of Hydra's or OmegaConf's."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"no {group or 'config'} named {name!r}; there are: {', '.join(error.options)}"
    unknown_key = getattr(error.__cause__, "full_key", None)  # OmegaConf knows it, Hydra only spells it in a text
    if unknown_key:
        return unknown_key_message(unknown_key, cls)
    # OmegaConf appends its internals from "full_key:" on.
    return f"the command line or config cannot be read: {str(error).partition('full_key:')[0]}"
