"""report.html and the closing summary, from the metrics of a run."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gptj_train.report import summary, write_report

CHARTS = [
    "Loss (mean over targets)",
    "Throughput (tokens per second)",
    "Learning rate",
    "Gradient norm before clipping",
    "Peak memory of rank 0 (GiB)",
]
ALONE = {"meta", "line", "polyline"}


class Page(HTMLParser):
    """Elements with their attributes; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ALONE:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def curves(self) -> list[list[tuple[float, float]]]:
        points = [str(line["points"]).split() for line in self.all("polyline")]
        return [[(float(p.split(",")[0]), float(p.split(",")[1])) for p in curve] for curve in points]


def test_a_curve_may_begin_late(tmp_path: Path) -> None:
    lines = [{"step": 0, "tokens": 0, "eval_loss": 3.0}, {"step": 1, "tokens": 9, "eval_loss": 2.0, "eval_loss/a": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(tmp_path, {}).read_text())
    assert [len(curve) for curve in page.curves()] == [2, 1]
    assert "eval_loss/a" not in summary(str(tmp_path), "GPTJForCausalLM")


def step(number: int, **changes: float) -> dict[str, float]:
    return {
        "step": number,
        "loss": 5.0 - number / 2,
        "lr": 1e-3 / number,
        "grad_norm": 0.5 + number,
        "tokens": 100 * number,
        "tokens_per_second": 1000.0 + number,
        "step_seconds": 0.25,
        "memory_gib": 1.5,
        "skipped_steps": 0,
    } | changes


def evaluated(number: int, loss: float) -> dict[str, float]:
    return {"step": number, "tokens": 0, "eval_loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 2}


def run(folder: Path, *lines: dict[str, float]) -> Path:
    known = [{name: value if math.isfinite(value) else None for name, value in line.items()} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in known))
    return folder


def page(folder: Path, facts: dict[str, Any] | None = None, sample: str | None = None) -> Page:
    path = write_report(folder, facts or {}, sample)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    steps = [step(number) for number in range(1, 5)]
    return run(tmp_path, evaluated(0, 6.0), *steps, evaluated(4, 2.5))


def test_charts_facts_and_sample(folder: Path) -> None:
    made = page(folder, {"data": "3 documents"}, "a sample\nof text")
    assert [chart["aria-label"] for chart in made.all("svg")] == [
        *CHARTS,
        "Held-out perplexity",
        "Held-out bits_per_byte",
    ]
    assert {"data", "3 documents", "a sample\nof text", "training", "held-out"} <= set(made.words)
    assert any(word.endswith(" GiB at most on rank 0") for word in made.words)
    assert made.all("meta") == [{"charset": "utf-8"}]


def test_the_file_needs_nothing_else(folder: Path) -> None:
    page(folder, {"data": "x"}, "y")
    text = (folder / "report.html").read_text()
    assert not re.search(r"http|//|<script|<link|<img|src=|href=|@import|url\(", text)


def test_curves_go_through_the_numbers(folder: Path) -> None:
    training, held_out, *others = page(folder).curves()
    # Steps 0 to 4 spread over x = 64 to 632; losses 6.0 down to 2.5 over y = 12 to 196.
    assert held_out == [(64.0, 12.0), (632.0, 196.0)]
    assert [x for x, _ in training] == [206.0, 348.0, 490.0, 632.0]
    assert training[0][1] == pytest.approx(196 - (4.5 - 2.5) / 3.5 * 184, abs=0.1)
    assert [len(curve) for curve in others] == [4, 4, 4, 4, 2, 2]


def numbers(made: Page) -> list[float]:
    """All coordinates of the page."""
    plain = [
        float(attributes[name] or "")
        for tag, attributes in made.elements
        for name in ("x", "y", "x1", "x2", "y1", "y2")
        if tag in ("line", "text") and name in attributes
    ]
    return plain + [value for curve in made.curves() for point in curve for value in point]


@pytest.mark.parametrize(
    "lines",
    [
        [step(1)],
        [step(1), step(2, loss=math.nan, grad_norm=math.inf), step(3, loss=-math.inf)],
        [step(1, loss=1e30), step(2, loss=1e30)],
        [step(1, loss=1e17)],
        [step(number, loss=0.0, lr=0.0, grad_norm=0.0, memory=0.0) for number in (1, 2)],
        [step(number, lr=1e-5) for number in range(1, 2000)],
        [evaluated(0, math.nan), step(1), evaluated(1, math.inf)],
    ],
    ids=["one step", "nan and inf", "huge and equal", "huge", "zeros", "many steps", "nan evaluation"],
)
def test_every_coordinate_is_a_number_on_the_page(tmp_path: Path, lines: list[dict[str, float]]) -> None:
    made = page(run(tmp_path, *lines))
    found = numbers(made)
    assert len(found) > 50
    assert all(math.isfinite(number) and 0 <= number <= 640 for number in found)
    assert not re.search(r"\b(nan|inf)\b", (tmp_path / "report.html").read_text())


def test_values_that_are_no_numbers_are_left_out_of_their_curve(tmp_path: Path) -> None:
    made = page(run(tmp_path, step(1), step(2, loss=math.nan), step(3)))
    assert [len(curve) for curve in made.curves()] == [2, 3, 3, 3, 3]


def test_a_chart_without_a_number_is_left_out(tmp_path: Path) -> None:
    made = page(run(tmp_path, step(1, grad_norm=math.nan), step(2, grad_norm=math.nan)))
    assert [chart["aria-label"] for chart in made.all("svg")] == [name for name in CHARTS if "norm" not in name]


def test_without_metrics_there_are_facts(tmp_path: Path) -> None:
    made = page(tmp_path, {"data": "3 documents"})
    assert made.all("svg") == []
    assert "3 documents" in made.words


def test_text_is_text(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & \"quotes\""
    folder = run(tmp_path, step(1))
    made = page(folder, {evil: evil}, evil)
    assert made.all("script") == []
    assert made.words.count(evil) == 3


def test_summary(folder: Path) -> None:
    text = summary(str(folder), "GPTJForCausalLM", "line one\nline two")
    assert "Done. Training loss 4.500 -> 3.000 in 4 steps." in text
    assert "eval_loss 6.000 -> 2.500" in text
    assert "    line one\n    line two\n" in text
    for name in ("export", "report.html", "metrics.jsonl", "checkpoints"):
        assert f"{folder}/{name}" in text


def test_summary_of_components(tmp_path: Path) -> None:
    of_components = {"eval_loss/Web": 2.25, "perplexity/Web": 9.5, "eval_loss/Old Books": 1.5}
    run(tmp_path, evaluated(0, 6.0), evaluated(4, 2.0) | of_components)
    text = summary(str(tmp_path), "GPTJForCausalLM").splitlines()
    assert "Held-out loss by component: Web 2.250, Old Books 1.500." in text


def test_summary_with_losses_that_are_no_numbers(tmp_path: Path) -> None:
    run(tmp_path, step(1), step(2, loss=math.nan))
    assert "Training loss 4.500 -> nan in 2 steps." in summary(str(tmp_path), "GPTJForCausalLM")


def test_summary_without_metrics(tmp_path: Path) -> None:
    assert summary(str(tmp_path), "GPTJForCausalLM").startswith("\nDone.\n")
