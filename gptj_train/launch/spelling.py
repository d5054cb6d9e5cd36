"""Check how the arguments of a command line are spelled, before Hydra reads them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from gptj_train.errors import UserError
from gptj_train.schema import keys_of, plain_text_keys, text_keys, unknown_key_message

# Hydra's own switches that recipes pass on; the second group takes the next word as its value.
_SWITCHES = {"--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m", "--info"}
_SWITCHES |= {"--shell-completion", "-sc", "--cfg", "-c"}
_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--experimental-rerun"}
_REPLACED = {"--config-path", "-cp", "--config-name", "-cn"}

_NO_CHOICES = ("true", "false", "yes", "no", "on", "off", "1", "0", "null")
"""Values that a group cannot take, and that Hydra answers with its internals."""

_OWNER_OF_RECIPE = {"clm": "clm", "prepare_data": "clm", "classification": "classification", "qa": "qa"}
"""Recipes that take presets, and the recipe whose presets they take; ``plan`` takes all."""


def check_spelling(arguments: Sequence[str], primary: str, cls: type, configs: Path) -> None:
    """Check that every argument is a switch of Hydra's or has the form ``key=value``.

    Args:
        arguments: the command line, without ``--config-dir DIR``.
        primary: name of the recipe's primary config.
        configs: folder of the package's configs.

    Raises:
        UserError: the first argument that is neither, with its right spelling.
    """
    previous = ""
    for position, argument in enumerate(arguments):
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        switch = argument.partition("=")[0]
        if argument.startswith("-"):
            _check_switch(switch, argument, following, cls)
        elif previous not in _WITH_VALUE and not argument.startswith("~"):
            _check_override(argument, previous, following, cls, configs)
            _check_preset(argument, primary, configs)
        previous = argument


def _check_switch(switch: str, argument: str, following: str, cls: type) -> None:
    if switch in _SWITCHES or switch in _WITH_VALUE:
        return
    if switch in _REPLACED:
        raise UserError(f"{switch}: a recipe has one primary config; give a preset with +config=NAME")
    key = switch.lstrip("-").replace("-", "_")
    value = argument.partition("=")[2]
    if not value and following and not following.startswith("-") and "=" not in following:
        value = following
    raise UserError(f"{argument}: settings have no dashes; {_right_spelling(key, value, cls)}")


def _check_override(argument: str, previous: str, following: str, cls: type, configs: Path) -> None:
    key, equals, value = argument.partition("=")
    if key == "config" and equals:
        raise UserError(f"{argument}: presets are added with a plus; write +config={value or 'NAME'}")
    if key in ("preset", "+preset") or argument in ("config", "+config"):
        raise UserError(f"{argument}: a preset is given as +config={value or following or 'NAME'}")
    if key == "+config" and " " in value:
        raise UserError(f"{argument!r} is one argument; leave out the quotes around several settings")
    if equals and key != key.strip():
        right = shlex.quote(f"{key.strip()}={value.strip()}")
        raise UserError(f"{argument!r} has a space before the '='; write {right}")
    groups = {path.name for path in configs.iterdir() if path.is_dir()}
    if equals and key in groups and value.lower() in _NO_CHOICES:
        choices = ", ".join(path.stem for path in sorted((configs / key).glob("*.yaml")))
        raise UserError(f"{argument}: give one of its choices, {choices}")
    if not equals:
        _refuse_lone_word(argument, previous, following, cls, configs)


def _refuse_lone_word(argument: str, previous: str, following: str, cls: type, configs: Path) -> None:
    """Raise UserError for an argument without "=", with what was probably meant."""
    previous_key, _, previous_value = previous.lstrip("+").partition("=")
    if previous_value.startswith("[") and argument.endswith("]"):
        whole = shlex.quote(f"{previous}, {argument}")
        raise UserError(f"{argument!r} stands alone: separate the elements of a list by commas, and quote it, {whole}")
    if previous_value and previous_key in text_keys(cls) | plain_text_keys(cls):
        # The shell splits at spaces that are not in quotes.
        whole = shlex.quote(f"{previous} {argument}")
        raise UserError(f"{argument!r} stands alone: quote a value with spaces, {whole}")
    if argument in presets_of("plan", configs):
        raise UserError(f"{argument} is a preset; write +config={argument}")
    key = argument.removesuffix(":")  # as in YAML
    if key in keys_of(cls):
        if following.startswith("="):
            raise UserError(f"{key}: write {key}={following[1:] or 'VALUE'}, without spaces around the =")
        value = following if "=" not in following else ""
        raise UserError(f"{key} has no value; {_right_spelling(key, value, cls)}")
    raise UserError(f"{argument!r} is no setting; write key=value, and see the keys with --help")


def _right_spelling(key: str, value: str, cls: type) -> str:
    if key in ("config", "preset"):
        return f"write +config={value or 'NAME'}"
    if key in keys_of(cls):
        return f"write {key}={shlex.quote(value) if value else '...'}"
    return f"write key=value: {unknown_key_message(key, cls)}"


def _check_preset(argument: str, primary: str, configs: Path) -> None:
    """Raise UserError for a preset that belongs to another recipe."""
    key, _, name = argument.lstrip("+").partition("=")
    own = presets_of(primary, configs)
    if key == "config" and own and name not in own and name in presets_of("plan", configs):
        raise UserError(f"+config={name} is a preset of recipes/{owner_of(name)}.py; choose one of {', '.join(own)}")


def presets_of(primary: str, configs: Path) -> list[str]:
    """Return the presets that a recipe takes: its own, and those for every recipe."""
    names = [path.stem for path in sorted((configs / "config").glob("*.yaml"))]
    if primary == "plan":
        return names
    if primary not in _OWNER_OF_RECIPE:
        return []
    return [name for name in names if owner_of(name) in (None, _OWNER_OF_RECIPE[primary])]


def owner_of(preset: str) -> str | None:
    """Return the recipe that a preset belongs to, by its name; None for one that suits all."""
    words = preset.split("_")
    for owner in ("classification", "qa"):
        if owner in words:
            return owner
    # Its corpus and sample prompt are those of text.
    return "clm" if preset == "quickstart" else None
