"""Describe a recipe's keys for --help, from the values and comments of its YAML files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gptj_train.launch.spelling import presets_of

# "key: value   # comment"; the value may be a quoted text with a # in it.
_KEY_LINE = re.compile(r"""(\w+): *("(?:\\.|[^"\\])*"|[^#]*?) *(?:# *(.*))?""")
_NAME_WIDTH = 26
_LONGEST_VALUE = 24
_SYNTAX = """\
Settings are key=value, without dashes: max_steps=100, 'sample_prompt=Once upon a time', 'data.train=[a.txt, b.txt]'.
--cfg job prints the composed config, --multirun key=a,b runs a sweep, --config-dir DIR adds your own presets,
--shell-completion install=bash prints tab completion, --hydra-help lists Hydra's own switches."""


@dataclass(frozen=True)
class Key:
    """A key as its YAML file has it.

    Attributes:
        name: without its group.
        value: the text of the default.
        comment: its explanation, empty if an included file explains it.
    """

    name: str
    value: str
    comment: str


def keys_in(file: Path) -> list[Key]:
    """Return the top-level keys of a YAML file, without Hydra's own."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        match = _KEY_LINE.fullmatch(line)
        if match and match[1] not in ("defaults", "hydra"):
            found.append(Key(match[1], match[2], match[3] or ""))
    return found


def header_of(file: Path) -> str:
    """Return the comment at the top of a YAML file, as one line."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def with_bases(file: Path) -> list[Path]:
    """Return a YAML file and those that its defaults list includes whole, the file itself first."""
    defaults = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("defaults", [])
    files = [file]
    for entry in defaults:
        if isinstance(entry, str) and entry != "_self_":
            files += with_bases(file.parent / f"{entry}.yaml")
    return files


def help_lines(primary: str, configs: Path, values: Mapping[str, Any], choices: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of a recipe's --help.

    Args:
        primary: name of the primary config.
        configs: folder of the package's configs.
        values: the composed config, whose ??? are missing values.
        choices: chosen file of each group.
    """
    yield header_of(configs / f"{primary}.yaml")
    yield ""
    yield f"Usage: python recipes/{primary}.py [key=value ...]     (deepspeed -q, torchrun or srun for several ranks)"
    presets = presets_of(primary, configs)
    if presets:
        yield ""
        yield "Presets, +config=NAME:"
        for name in presets:
            yield f"  {name:<{_NAME_WIDTH}} {header_of(configs / 'config' / f'{name}.yaml')}"
    groups = {name: value for name, value in values.items() if name in choices and isinstance(value, Mapping)}
    if groups:
        yield ""
        yield "Groups, GROUP=CHOICE:"
    for group in groups:
        others = ", ".join(path.stem for path in sorted((configs / group).glob("*.yaml")))
        yield f"  {group:<{_NAME_WIDTH}} {choices[group]}   (of {others})"
    yield ""
    yield "Keys, with their values (??? must be given):"
    own = {name: value for name, value in values.items() if name not in groups}
    yield from _key_lines("", own, with_bases(configs / f"{primary}.yaml"))
    for group, inner in groups.items():
        yield ""
        yield from _key_lines(f"{group}.", inner, with_bases(configs / group / f"{choices[group]}.yaml"))
    yield ""
    yield _SYNTAX


def _key_lines(prefix: str, values: Mapping[str, Any], files: list[Path]) -> Iterator[str]:
    comments: dict[str, str] = {}
    for file in files:
        for key in keys_in(file):
            if key.comment:
                comments.setdefault(key.name, key.comment)
    for name, value in values.items():
        setting = f"{prefix}{name}={_as_written(value)}"
        yield f"  {setting:<{_NAME_WIDTH + _LONGEST_VALUE}} {comments.get(name, '')}".rstrip()


def _as_written(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ", ".join(str(element) for element in value) + "]"
    return repr(value)[1:-1] if isinstance(value, str) else str(value)
