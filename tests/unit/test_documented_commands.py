"""Commands in README, docs and scripts: the launcher is quiet, the recipes exist, and so do their presets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").glob("*.py")),
    *sorted((ROOT / "scripts").iterdir()),
    *sorted((ROOT / "gptj_train").rglob("*.py")),
    *sorted((ROOT / "gptj_train" / "configs").rglob("*.yaml")),
]
COMMANDS = []
for place in PLACES:
    if place.is_file():
        # A backslash joins the lines of a command.
        for command in re.findall(
            r"\b(?:deepspeed|python) [^\n`]*recipes/\w+\.py[^\n`]*", place.read_text().replace("\\\n", " ")
        ):
            COMMANDS.append((place.relative_to(ROOT).as_posix(), command))


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 40


@pytest.mark.parametrize(("place", "command"), COMMANDS)
def test_a_command_is_quiet_and_names_what_exists(place: str, command: str) -> None:
    launcher, _, rest = command.partition("recipes/")
    if launcher.startswith("deepspeed"):
        assert launcher.split()[1] == "-q"
    recipe = rest.split()[0].rstrip(".,:;)\"'")
    assert recipe == "NAME.py" or (ROOT / "recipes" / recipe).is_file()
    if "--config-dir" in command:
        return  # presets of the reader's own
    for preset in re.findall(r"\+config=(\w+)", rest):
        assert preset in ("NAME", "PRESET") or (ROOT / "configs" / "config" / f"{preset}.yaml").is_file()
