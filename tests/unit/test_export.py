"""An export is there and right, or not there: each check of it, with an engine that is a plain model."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import gptj_train
from gptj_train import GPTJConfig
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.export.from_engine import export
from gptj_train.export.verify import ExportError
from gptj_train.model.lora import LoraConfig
from gptj_train.training.model_files import ModelFiles

FULL = LoraConfig(rank=0, alpha=1.0, dropout=0.0, targets=[], rslora=False, init_from=None)
FACTS = {"data": "12 documents", "batch": "4 windows | all of them"}


class PlainEngine:
    """What an export needs of an engine, with a single rank and no DeepSpeed."""

    rank, device = 0, torch.device("cpu")

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.shapes = self.trained = {name: parameter.shape for name, parameter in model.named_parameters()}

    def forward(self, batch: dict[str, Tensor], targets: float) -> Any:
        return self.model(**batch)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    def full_parameters(self, names: Any = None) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()

    def gathered(self, rows: list[Any]) -> list[Any]:
        return rows


@pytest.fixture
def parts(tokenizer: Tokenizer) -> tuple[PlainEngine, ModelFiles]:
    ids = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 359}
    config = GPTJConfig(vocab_size=360, n_positions=48, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **ids)
    model = gptj_train.GPTJForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return PlainEngine(model), ModelFiles(config, "GPTJForCausalLM", tokenizer)


def run(parts: tuple[Any, ModelFiles], folder: Path, dtype: str = "fp32") -> Path:
    return export(*parts, folder, dtype=dtype, facts=FACTS, lora=FULL, base="/models/gpt-j-6B")


def test_a_last_step_without_a_loss_is_no_hindrance(parts: tuple[PlainEngine, ModelFiles], tmp_path: Path) -> None:
    """metrics.jsonl has null for what is no number."""
    lines = ['{"step": 1, "loss": 2.5, "tokens": 7}', '{"step": 2, "loss": null, "tokens": 14}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run(parts, tmp_path / "export")
    report = json.loads((tmp_path / "export_report.json").read_text())
    assert report["run"]["training"] == "1 step, 7 tokens, loss 2.5000"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_what_an_export_holds(parts: tuple[PlainEngine, ModelFiles], tmp_path: Path, dtype: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1200, "loss": 2.5, "tokens": 34567}\n{"step": 1200, "eval_loss": 2.25}\n'
    )
    folder = run(parts, tmp_path / "export", dtype)
    names = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    names |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"}
    assert {file.name for file in folder.iterdir()} == names
    assert {file.name for file in tmp_path.iterdir()} == {"export", "export_report.json", "metrics.jsonl"}

    report = json.loads((tmp_path / "export_report.json").read_text())
    count = sum(parameter.numel() for parameter in parts[0].model.parameters())
    assert report["parameters"] == count
    assert report["total_size"] == count * (4 if dtype == "fp32" else 2)
    assert report["files"].keys() == names
    for name, entry in report["files"].items():
        assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert report["run"]["training"] == "1,200 steps, 34,567 tokens, loss 2.5000"
    assert report["logits"]["relative_difference"] < (1e-5 if dtype == "fp32" else 0.02)

    card = (folder / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "transformers"\n')
    for row in ("| start | gpt-j-6B |", "| eval loss | 2.2500 |", "| batch | 4 windows \\| all of them |"):
        assert row in card
    assert "/models" not in card
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert theirs.generation_config.pad_token_id == theirs.config.pad_token_id == 359
    assert len(AutoTokenizer.from_pretrained(folder)) == theirs.config.vocab_size == 360
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == 359


@pytest.mark.parametrize("kind", ["GPTJForSequenceClassification", "GPTJForQuestionAnswering"])
def test_other_heads_are_checked_too(parts: tuple[PlainEngine, ModelFiles], tmp_path: Path, kind: str) -> None:
    _, files = parts
    engine = PlainEngine(getattr(gptj_train, kind)(files.config))
    run((engine, ModelFiles(files.config, kind, files.tokenizer)), tmp_path / "export")
    report = json.loads((tmp_path / "export_report.json").read_text())
    assert report["logits"]["relative_difference"] < 1e-5


def swapped(stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Two matrices of one shape change places in every block."""
    state = dict(stream)
    for layer in range(2):
        q, k = (f"transformer.h.{layer}.attn.{name}_proj.weight" for name in ("v", "out"))
        state[q], state[k] = state[k], state[q]
    yield from state.items()


def with_nan(stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        yield name, tensor.detach().index_fill(0, torch.tensor([3]), float("nan")) if "ln_f" in name else tensor


def of_old(stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights that are not those the engine computes with: of an earlier step, say."""
    for name, tensor in stream:
        yield name, tensor * 1.5 if "fc_out" in name else tensor


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [(swapped, "its logits differ by"), (of_old, "its logits differ by"), (with_nan, "contains NaN or infinity")],
)
def test_a_failed_check_leaves_nothing(
    parts: tuple[Any, ModelFiles], tmp_path: Path, monkeypatch: Any, spoil: Any, message: str, earlier: bool
) -> None:
    if earlier:  # an export that passed its checks stays
        run(parts, tmp_path / "export")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    whole = parts[0].full_parameters
    monkeypatch.setattr(parts[0], "full_parameters", lambda names=None: spoil(whole()))
    with pytest.raises(ExportError, match=message) as caught:
        run(parts, tmp_path / "export", "bf16" if spoil is swapped else "fp32")
    assert isinstance(caught.value, UserError)  # one line and exit code 2
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def test_a_disk_that_changes_what_is_written(
    parts: tuple[Any, ModelFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = ModelFiles.save

    def save_and_flip(self: ModelFiles, folder: Path, dtype: torch.dtype) -> None:
        save(self, folder, dtype)
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-2] ^= 1  # one low bit of the last weight: nothing else could tell
        (folder / "model.safetensors").write_bytes(content)

    monkeypatch.setattr(ModelFiles, "save", save_and_flip)
    with pytest.raises(ExportError, match="the disk does not hold the bytes that were written"):
        run(parts, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(parts: tuple[Any, ModelFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks gather on while rank 0 gives up."""
    taken = []
    whole = parts[0].full_parameters

    def counted(names: Any = None) -> Iterator[tuple[str, Tensor]]:
        for pair in whole():
            taken.append(pair[0])
            yield pair

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(parts[0], "full_parameters", counted)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ExportError, match="No space left"):
        run(parts, tmp_path / "export")
    assert taken == list(parts[0].shapes)
    assert list(tmp_path.iterdir()) == []


def test_a_value_beyond_fp16_is_one_line(parts: tuple[Any, ModelFiles], tmp_path: Path, monkeypatch: Any) -> None:
    whole = parts[0].full_parameters

    def large(names: Any = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in whole():
            yield name, tensor + 1e5 if name == "lm_head.bias" else tensor

    monkeypatch.setattr(parts[0], "full_parameters", large)
    with pytest.raises(UserError, match=r"lm_head\.bias contains NaN or infinity; a weight is beyond fp16's range"):
        run(parts, tmp_path / "export", "fp16")
    assert list(tmp_path.iterdir()) == []
