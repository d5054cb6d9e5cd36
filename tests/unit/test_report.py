"""report.html and the closing summary, from the metrics of a run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gptj_train.report import write_report
from gptj_train.report_charts import thinned
from gptj_train.run_summary import summary

CHARTS = [
    "Loss (mean over targets)",
    "Throughput (tokens per second)",
    "Learning rate",
    "Gradient norm before clipping",
    "Peak memory of rank 0 (GiB)",
]


class Page(HTMLParser):
    """The words, headings and elements of a report, and the curves in the data that Bokeh draws."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self._tag = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._tag = tag

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag not in ("script", "style"):
            self.words.append(data)
        if self._tag == "h2":
            self.headings.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def curves(self) -> list[list[tuple[float, float]]]:
        """The points of each line, in the order of the charts."""
        found = re.search(r"const docs_json = '(.*?)';\n", self.text)
        if found is None:
            return []
        (document,) = json.loads(found[1].encode().decode("unicode_escape")).values()
        return [list(zip(*columns, strict=True)) for columns in columns_in(document)]


def columns_in(value: Any) -> Iterator[tuple[list[float], list[float]]]:
    """The columns step and value of each data source within a Bokeh document."""
    if isinstance(value, dict):
        if value.get("name") == "ColumnDataSource":
            columns = dict(value["attributes"]["data"]["entries"])
            yield columns["step"], columns["value"]
        else:
            for inner in value.values():
                yield from columns_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from columns_in(inner)


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
    (folder / "config.yaml").write_text("max_steps: 4 # <b>\n")
    made = page(folder, {"data": "3 documents"}, "a sample\nof text")
    assert made.headings == [
        "Numbers",
        *CHARTS,
        "Held-out perplexity",
        "Held-out bits per byte",
        "Sample from the export",
    ]
    assert {"data", "3 documents", "a sample\nof text", "max_steps: 4 # <b>\n"} <= set(made.words)
    assert any(word.endswith(" GiB at most on rank 0") for word in made.words)
    assert "0:00:01 in 4 steps, without evaluations and saves" in made.words
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in made.all("meta")


def test_first_best_and_last_numbers(tmp_path: Path) -> None:
    made = page(run(tmp_path, evaluated(0, 6.0), step(1), evaluated(2, 2.0), evaluated(4, 2.5)))
    at = made.words.index("eval loss")
    assert made.words[at : at + 4] == ["eval loss", "6", "2 (step 2)", "2.5"]


def test_the_file_needs_nothing_else(folder: Path) -> None:
    made = page(folder, {"data": "x"}, "y")
    assert made.all("link") + made.all("img") + made.all("iframe") == []
    assert [script for script in made.all("script") if "src" in script] == []
    assert not re.search(r"@import|url\(", made.text[: made.text.index("<script")])
    assert len(made.text) < 2_000_000


def test_dark_mode_and_logarithmic_perplexity(folder: Path) -> None:
    text = page(folder).text
    assert "prefers-color-scheme: dark" in text
    assert text.count('"name":"LogScale"') == 1


def test_curves_are_the_numbers(folder: Path) -> None:
    training, held_out, *others = page(folder).curves()
    assert training == [(1, 4.5), (2, 4.0), (3, 3.5), (4, 3.0)]
    assert held_out == [(0, 6.0), (4, 2.5)]
    assert [len(curve) for curve in others] == [4, 4, 4, 4, 2, 2]


def test_components_have_small_charts(tmp_path: Path) -> None:
    made = page(run(tmp_path, evaluated(0, 6.0) | {"eval_loss/Web": 3.0}, evaluated(1, 5.0) | {"eval_loss/Web": 2.0}))
    assert made.headings[-2:] == ["Held-out loss by component", "Web"]
    assert made.curves()[-1] == [(0, 3.0), (1, 2.0)]
    at = made.words.index("Numbers by component")
    assert "eval loss/Web" in made.words[at:]
    assert "eval loss/Web" not in made.words[:at]


def test_small_charts_share_their_y_axis(tmp_path: Path) -> None:
    components = [{"eval_loss/Web": 3.0, "eval_loss/Books": 9.0}, {"eval_loss/Web": 1.0, "eval_loss/Books": 8.0}]
    lines = [evaluated(number, 5.0) | component for number, component in enumerate(components)]
    ranges = re.findall(r'"name":"Range1d","id":"[^"]*","attributes":(\{[^}]*\})', page(run(tmp_path, *lines)).text)
    assert [json.loads(one) for one in ranges] == 2 * [{"start": 0.6, "end": 9.4}]


def test_a_long_curve_keeps_its_spikes() -> None:
    curve = [(number, 1.0) for number in range(100_000)]
    curve[12_345] = (12_345, 9.0)
    curve[54_321] = (54_321, 0.1)
    short = thinned(curve)
    assert len(short) <= 2000
    assert {(0, 1.0), (12_345, 9.0), (54_321, 0.1), (99_999, 1.0)} <= set(short)
    assert [number for number, _ in short] == sorted({number for number, _ in short})


@pytest.mark.parametrize(
    "lines",
    [
        [step(1)],
        [step(1), step(2, loss=math.nan, grad_norm=math.inf), step(3, loss=-math.inf)],
        [step(1, loss=1e30), step(2, loss=1e30)],
        [step(number, loss=0.0, lr=0.0, grad_norm=0.0, memory=0.0) for number in (1, 2)],
        [evaluated(0, math.nan), step(1), evaluated(1, math.inf)],
    ],
    ids=["one step", "nan and inf", "huge and equal", "zeros", "nan evaluation"],
)
def test_every_point_is_a_number(tmp_path: Path, lines: list[dict[str, float]]) -> None:
    points = [value for curve in page(run(tmp_path, *lines)).curves() for point in curve for value in point]
    assert len(points) >= 8
    assert all(math.isfinite(value) for value in points)


def test_values_that_are_no_numbers_are_left_out_of_their_curve(tmp_path: Path) -> None:
    made = page(run(tmp_path, step(1), step(2, loss=math.nan), step(3)))
    assert [len(curve) for curve in made.curves()] == [2, 3, 3, 3, 3]


def test_a_chart_without_a_number_is_left_out(tmp_path: Path) -> None:
    made = page(run(tmp_path, step(1, grad_norm=math.nan), step(2, grad_norm=math.nan)))
    assert made.headings == ["Numbers", *[name for name in CHARTS if "norm" not in name]]


def test_without_metrics_there_are_facts(tmp_path: Path) -> None:
    made = page(tmp_path, {"data": "3 documents"})
    assert made.all("script") == []
    assert "3 documents" in made.words


def test_text_is_text(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & \"quotes\""
    folder = run(tmp_path, step(1), evaluated(1, 2.0) | {f"eval_loss/{evil}": 1.0})
    scripts = len(page(run(tmp_path, step(1), evaluated(1, 2.0) | {"eval_loss/a": 1.0})).all("script"))
    run(tmp_path, step(1), evaluated(1, 2.0) | {f"eval_loss/{evil}": 1.0})
    made = page(folder, {evil: evil}, evil)
    assert len(made.all("script")) == scripts
    assert made.words.count(evil) == 4


def test_summary(folder: Path) -> None:
    text = summary(str(folder), "GPTJForCausalLM", sample="line one\nline two")
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


def test_summary_of_forgetting_is_from_start_to_end(tmp_path: Path) -> None:
    first, last = {"eval_loss/forgetting": 3.0}, {"eval_loss/forgetting": 3.5, "eval_loss/Web": 2.0}
    run(tmp_path, evaluated(0, 6.0) | first, evaluated(4, 2.0) | last)
    text = summary(str(tmp_path), "GPTJForCausalLM").splitlines()
    assert "Text from outside (data.forgetting): loss 3.000 -> 3.500." in text
    assert "Held-out loss by component: Web 2.000." in text


@pytest.mark.parametrize("facts", ['{"trained_parameters": 1500, "parameters": 60000}', "{}", "no JSON"])
def test_summary_of_a_lora_run_names_the_adapter(tmp_path: Path, facts: str) -> None:
    run(tmp_path, step(1))
    assert "adapter" not in summary(str(tmp_path), "GPTJForCausalLM")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "environment.json").write_text(facts)
    counts = "1,500 of 60,000 parameters, 2.50%; " if "1500" in facts else ""
    line = f"  adapter       {tmp_path}/adapter   ({counts}PEFT loads it on the base model)"
    text = summary(str(tmp_path), "GPTJForCausalLM")
    assert line in text.splitlines()
    assert "Training loss 4.500 -> 4.500 in 1 step." in text
