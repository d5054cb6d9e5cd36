"""The table of cases and outcomes that a run of these tests leaves in tests/cluster/results/."""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).parent / "results"


class Outcomes:
    """Collects a row for each case, and writes them at the end; rows of cases that were not run stay."""

    def __init__(self, name: str, title: str, command: str) -> None:
        self._path = RESULTS / f"{name}.md"
        self._head = [f"# {title}", "", f"Made by `{command}`.", "", "| case | outcome |", "|---|---|"]
        self._rows: dict[str, str] = {}
        if self._path.exists():
            for line in self._path.read_text().splitlines()[len(self._head) :]:
                case, outcome = line.removeprefix("| ").removesuffix(" |").split(" | ")
                self._rows[case] = outcome

    def add(self, case: str, outcome: str) -> None:
        self._rows[case] = outcome

    def write(self) -> None:
        RESULTS.mkdir(exist_ok=True)
        rows = [f"| {case} | {outcome} |" for case, outcome in self._rows.items()]
        self._path.write_text("\n".join([*self._head, *rows]) + "\n")
