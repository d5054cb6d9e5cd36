"""docs/configuration.md agrees with the YAML files."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date() -> None:
    written = runpy.run_path(str(ROOT / "scripts" / "configuration_page.py"))["page"]()
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == written, (
        "run: python scripts/configuration_page.py"
    )
    assert "| `lr` | `1.0e-5` | peak learning rate, after warm-up |" in written
