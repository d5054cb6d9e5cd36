"""Write docs/configuration.md from the values and comments in gptj_train/configs."""

from __future__ import annotations

from pathlib import Path

from gptj_train.launch.key_help import header_of, keys_in

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "gptj_train" / "configs"
PAGE = ROOT / "docs" / "configuration.md"
_INTRODUCTION = """# Configuration

Every key, with its default and its meaning. This page is written by `python scripts/configuration_page.py` from the
files in `gptj_train/configs`; change those.

Set a key as `key=value`, of a group as `group.key=value`; `???` must be given. Choose another file of a group with
`group=choice`, a preset with `+config=NAME`. `python recipes/NAME.py --help` prints the keys of one recipe, and
`--cfg job` the composed config.

Tab completion in bash: `eval "$(python recipes/clm.py --shell-completion install=bash)"`, then
`python recipes/clm.py optim.<TAB>`.
"""


def page() -> str:
    """Return the text of the page."""
    parts = [_INTRODUCTION, "## Recipes\n"]
    recipes = sorted(file for file in CONFIGS.glob("*.yaml") if file.stem not in ("finetune", "hydra_settings"))
    for file in [CONFIGS / "finetune.yaml", *recipes]:
        parts.append(_section("###", file.stem, file))
    parts.append("## Groups\n")
    for file in sorted(CONFIGS.glob("*/*.yaml")):
        if file.parent.name != "config":
            parts.append(_section("###", f"{file.parent.name}={file.stem}", file))
    parts.append("## Presets\n")
    for file in sorted((CONFIGS / "config").glob("*.yaml")):
        parts.append(f"* `+config={file.stem}`: {header_of(file)}")
    return "\n".join(parts) + "\n"


def _section(level: str, title: str, file: Path) -> str:
    lines = [f"{level} {title}\n"]
    header = header_of(file)
    if header:
        lines.append(f"{header}\n")
    keys = keys_in(file)
    if keys:
        lines += ["| key | default | meaning |", "|---|---|---|"]
    for key in keys:
        meaning = key.comment.replace("|", "\\|")
        value = key.value.replace("|", "\\|")
        lines.append(f"| `{key.name}` | {f'`{value}`' if value else ''} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
