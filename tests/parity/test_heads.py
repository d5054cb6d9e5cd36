"""Classification and question-answering heads equal Transformers' in values, losses and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pair import TOLERANCE, VOCAB, assert_close, build_pair, random_ids
from torch import Tensor

from gptj_train import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification

PAD = VOCAB - 1

LABELS = {
    "single_label_classification": torch.tensor([2, 0, 1, 2]),
    "multi_label_classification": torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]),
    "regression": torch.tensor([[0.5, -1, 2], [0, 0, 1], [3, 1, 0], [1, 2, 3]]),
}


def padded_ids(side: str) -> Tensor:
    ids = torch.randint(VOCAB - 1, (4, 9))
    for row, pads in enumerate((0, 3, 1, 5)):
        padding = slice(0, pads) if side == "left" else slice(9 - pads, 9)
        ids[row, padding] = PAD
    return ids


def assert_same_loss_and_gradients(ours: Any, theirs: Any, inputs: dict[str, Any], names: tuple[str, ...]) -> None:
    mine, other = ours(**inputs), theirs(**inputs)
    assert_close(mine.loss, other.loss)
    for name in names:
        assert_close(mine[name], other[name])
    mine.loss.backward()
    other.loss.backward()
    # Relative to the largest gradient of all: that of the span head's bias is zero but for rounding.
    scale = max(parameter.grad.abs().max() for parameter in theirs.parameters())
    for parameter, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (parameter.grad - reference.grad).abs().max() < TOLERANCE * scale


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("problem", LABELS)
def test_classification(problem: str, stated: bool, side: str) -> None:
    if problem == "regression" and not stated:
        ours, theirs = build_pair("GPTJForSequenceClassification", num_labels=1, pad_token_id=PAD)
        labels = torch.tensor([0.5, -1, 2, 3])
    else:
        changes = {"num_labels": 3, "pad_token_id": PAD} | ({"problem_type": problem} if stated else {})
        ours, theirs = build_pair("GPTJForSequenceClassification", **changes)
        labels = LABELS[problem]
    assert_same_loss_and_gradients(ours, theirs, {"input_ids": padded_ids(side), "labels": labels}, ("logits",))
    assert ours.config.problem_type == theirs.config.problem_type == problem


def test_attention_mask_locates_row_ends_without_pad_id() -> None:
    ours, theirs = build_pair("GPTJForSequenceClassification", num_labels=3, pad_token_id=PAD)
    ids = padded_ids("right")
    mask = (ids != PAD).long()
    expected = theirs(ids, attention_mask=mask).logits
    ours.config.pad_token_id = None
    assert_close(ours(ids, attention_mask=mask).logits, expected)
    assert_close(ours(ids[:1]).logits, theirs(ids[:1]).logits)
    with pytest.raises(ValueError, match="give attention_mask, or set"):
        ours(ids)


def texts_padded_by_eos() -> tuple[list[Tensor], Tensor, Tensor]:
    """Texts, two of which end with EOS, and a batch of them, padded with EOS on the right: the vocabulary is full."""
    texts = [torch.randint(VOCAB - 1, (length,)) for length in (9, 6, 4, 1)]
    texts[1][-1] = texts[2][-1] = PAD
    ids, mask = torch.full((4, 9), PAD), torch.zeros(4, 9, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return texts, ids, mask


def test_padding_by_eos_without_a_spare_row_in_classification() -> None:
    ours, theirs = build_pair("GPTJForSequenceClassification", num_labels=3, pad_token_id=PAD, eos_token_id=PAD)
    texts, ids, mask = texts_padded_by_eos()
    found = ours(ids, attention_mask=mask).logits
    for row, text in enumerate(texts):
        assert_close(found[row], ours(text[None], attention_mask=torch.ones(1, len(text))).logits[0])
    # Transformers looks for the last token that is not the pad id: before the end of texts that end with EOS.
    other = theirs(ids, attention_mask=mask).logits
    assert_close(found[[0, 3]], other[[0, 3]])
    assert not torch.allclose(found[[1, 2]], other[[1, 2]], rtol=1e-2)


def test_padding_by_eos_without_a_spare_row_in_question_answering() -> None:
    ours, theirs = build_pair("GPTJForQuestionAnswering", pad_token_id=PAD, eos_token_id=PAD)
    texts, ids, mask = texts_padded_by_eos()
    found, other = ours(ids, attention_mask=mask), theirs(ids, attention_mask=mask)
    for row, text in enumerate(texts):
        alone = ours(text[None])
        assert_close(found.start_logits[row, : len(text)], alone.start_logits[0])
        assert_close(found.end_logits[row, : len(text)], alone.end_logits[0])
        assert_close(found.start_logits[row, : len(text)], other.start_logits[row, : len(text)])


@pytest.mark.parametrize("problem", LABELS)
def test_num_items_in_batch_divides_the_summed_loss(problem: str) -> None:
    ours, _ = build_pair("GPTJForSequenceClassification", num_labels=3, pad_token_id=PAD, problem_type=problem)
    ids, labels = padded_ids("right"), LABELS[problem]
    assert_close(
        ours(ids, labels=labels, num_items_in_batch=labels.numel()).loss, ours(ids, labels=labels).loss.detach()
    )


def test_question_answering() -> None:
    ours, theirs = build_pair("GPTJForQuestionAnswering")
    inputs = {
        "input_ids": random_ids(batch=4),
        "start_positions": torch.tensor([0, 3, 40, -2]),  # 40 is no target, -2 counts as 0.
        "end_positions": torch.tensor([2, 10, 11, 5]),
        "attention_mask": torch.ones(4, 11, dtype=torch.long),
    }
    assert_same_loss_and_gradients(ours, theirs, inputs, ("start_logits", "end_logits"))


def test_num_items_in_batch_divides_the_summed_span_loss() -> None:
    ours, _ = build_pair("GPTJForQuestionAnswering")
    ids, where = random_ids(batch=4), torch.tensor([0, 3, 4, 2])
    expected = ours(ids, start_positions=where, end_positions=where + 1).loss.detach()
    summed = ours(ids, start_positions=where, end_positions=where + 1, num_items_in_batch=4).loss
    assert_close(summed, expected)


@pytest.mark.parametrize("kind", ["GPTJForSequenceClassification", "GPTJForQuestionAnswering"])
def test_folders_load_in_both_libraries(tmp_path: Path, kind: str) -> None:
    names = {0: "bad", 1: "fair", 2: "good"} if kind == "GPTJForSequenceClassification" else {0: "start", 1: "end"}
    ours, theirs = build_pair(kind, id2label=names, pad_token_id=PAD)
    cls = GPTJForSequenceClassification if "Class" in kind else GPTJForQuestionAnswering
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    read_there = getattr(transformers, kind).from_pretrained(tmp_path / "ours")
    read_here = cls.from_pretrained(tmp_path / "theirs")
    assert read_there.config.id2label == read_here.config.id2label == names
    for mine, other in zip(read_here.parameters(), read_there.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_new_head_on_a_causal_lm_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, _ = build_pair()
    ours.save_pretrained(tmp_path / "lm", dtype=torch.bfloat16)
    model = GPTJForSequenceClassification.from_pretrained(tmp_path / "lm")
    assert "new head, not in the folder: score.weight" in caplog.text
    assert torch.equal(model.transformer.wte.weight, ours.transformer.wte.weight.bfloat16())
    assert model.score.weight.shape == (2, 32)
    assert 0.01 < model.score.weight.float().std() < 0.03
    model.save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="missing: lm_head"):
        GPTJForCausalLM.from_pretrained(tmp_path / "head")
