"""The table of cases and outcomes that a run of these tests leaves in tests/cluster/results/."""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).parent / "results"


class Outcomes:
    """Collects a row for each case, and writes them all at the end."""

    def __init__(self, name: str, title: str, command: str) -> None:
        self._path = RESULTS / f"{name}.md"
        self._lines = [f"# {title}", "", f"Made by `{command}`.", "", "| case | outcome |", "|---|---|"]

    def add(self, case: str, outcome: str) -> None:
        self._lines.append(f"| {case} | {outcome.replace('|', '/')} |")

    def write(self) -> None:
        RESULTS.mkdir(exist_ok=True)
        self._path.write_text("\n".join(self._lines) + "\n")
