"""PEFT, the text-generation pipeline, lm-eval's HFLM and HF Trainer work on our models as on Transformers'."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pair import assert_close, build_pair, random_ids
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

import gptj_train
from gptj_train import GPTJForCausalLM, GPTJModel

END = 256
TEXTS = ["the cat sat", "on a mat", "and slept", "all day long"]


def byte_tokenizer() -> Any:
    """Return a tokenizer with a token for each byte, and an end token."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def text_pair(kind: str = "GPTJForCausalLM") -> tuple[Any, Any]:
    torch.manual_seed(0)
    return build_pair(kind, vocab_size=257, eos_token_id=END, bos_token_id=END, pad_token_id=END)


@pytest.mark.parametrize("kind", ["GPTJForCausalLM", "GPTJForSequenceClassification", "GPTJForQuestionAnswering"])
def test_signatures_name_every_argument(kind: str) -> None:
    ours = inspect.signature(getattr(gptj_train, kind).forward).parameters
    theirs = inspect.signature(getattr(transformers, kind).forward).parameters
    assert set(theirs) - {"kwargs"} <= set(ours)
    assert set(inspect.signature(GPTJModel.forward).parameters) <= set(ours)
    assert not any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in ours.values())


def test_names() -> None:
    ours, theirs = text_pair()
    for name in ("device", "dtype", "base_model_prefix", "main_input_name", "loss_type", "is_activation_checkpointing"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.can_generate() is theirs.can_generate() is True
    assert not GPTJModel.can_generate()
    assert ours.base_model is ours.transformer
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.num_parameters(exclude_embeddings=True) == theirs.num_parameters(exclude_embeddings=True)
    assert ours.get_memory_footprint() == theirs.get_memory_footprint(return_buffers=False)
    assert ours.get_input_embeddings() is ours.transformer.wte
    assert ours.get_output_embeddings() is ours.lm_head
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert ours.is_gradient_checkpointing
    ours.gradient_checkpointing_disable()
    assert not ours.is_gradient_checkpointing


@pytest.mark.parametrize("size", [300, 200, None])
@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(tied: bool, size: int | None) -> None:
    torch.manual_seed(0)
    ours, theirs = build_pair(tie_word_embeddings=tied)
    ids = random_ids(vocab=90)
    before = ours(ids).logits
    rows = 101 if size is None else size
    assert ours.resize_token_embeddings(size) is ours.get_input_embeddings()
    theirs.resize_token_embeddings(rows, mean_resizing=False)
    assert ours.config.vocab_size == ours.lm_head.out_features == rows
    kept = min(rows, 101)
    assert_close(ours(ids).logits[..., :kept], before[..., :kept])
    assert_close(theirs(ids).logits[..., :kept], before[..., :kept])
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) is tied
    if rows > 101:
        assert_close(ours.transformer.wte.weight[-1], ours.transformer.wte.weight[:101].mean(dim=0))
    ours(ids, labels=ids).loss.backward()
    assert ours.transformer.wte.weight.grad.shape == (rows, 32)


def test_peft_trains_and_generates(tmp_path: Path) -> None:
    ours, theirs = text_pair()
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, init_lora_weights=False)
    models = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        models.append(get_peft_model(model, config))
    ids = random_ids(vocab=250)
    losses = [model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss for model in models]
    assert_close(*losses)
    found = []
    for model, loss in zip(models, losses, strict=True):
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        assert_close(found[0][name], gradient, 1e-4)
    texts = [model.eval().generate(input_ids=ids, max_new_tokens=6, do_sample=False) for model in models]
    assert torch.equal(*texts)
    models[0].save_pretrained(tmp_path)
    again = transformers.GPTJForCausalLM(theirs.config)
    again.load_state_dict(text_pair()[1].state_dict())
    loaded = PeftModel.from_pretrained(again, tmp_path)
    assert_close(models[0](input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_text_generation_pipeline() -> None:
    answers = []
    for model in text_pair():
        pipeline = transformers.pipeline("text-generation", model=model, tokenizer=byte_tokenizer(), device="cpu")
        answers.append(pipeline(TEXTS, do_sample=False, max_new_tokens=8, batch_size=2))
    assert answers[0] == answers[1]
    assert answers[0][0][0]["generated_text"].startswith(TEXTS[0])


@pytest.mark.ecosystem
def test_lm_eval_takes_the_model() -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [("the cat", " sat"), ("on", " a mat")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    until = [Instance("generate_until", {}, ("the cat", {"until": ["\n"], "max_gen_toks": 5}), 0)]
    found = []
    for model in text_pair():
        harness = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=2, device="cpu")
        found.append((harness.loglikelihood(requests), harness.generate_until(until)))
    (ours, our_text), (theirs, their_text) = found
    assert our_text == their_text
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[0] == pytest.approx(other[0], rel=1e-4)
        assert mine[1] == other[1]


def rows(kind: str) -> list[dict[str, Any]]:
    torch.manual_seed(2)
    made = []
    for index in range(8):
        # Left padding, which only attention_mask hides.
        ids = torch.cat((torch.full((index % 4,), END), torch.randint(250, (12 - index % 4,))))
        row = {"input_ids": ids, "attention_mask": (ids != END).long()}
        if kind == "GPTJForCausalLM":
            row["labels"] = ids.masked_fill(torch.arange(12) < 2 * (index % 5), -100).masked_fill(ids == END, -100)
        elif kind == "GPTJForSequenceClassification":
            row["labels"] = torch.tensor(index % 2)
        else:
            row["start_positions"], row["end_positions"] = torch.tensor(5), torch.tensor(6 + index % 4)
        made.append(row)
    return made


@pytest.mark.ecosystem
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GPTJForCausalLM", {}),
        ("GPTJForCausalLM", {"gradient_accumulation_steps": 2}),
        ("GPTJForCausalLM", {"gradient_checkpointing": True}),
        ("GPTJForSequenceClassification", {}),
        ("GPTJForQuestionAnswering", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_trainer(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    logs = []
    models = text_pair(kind)
    for index, model in enumerate(models):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(index)),
            per_device_train_batch_size=2,
            num_train_epochs=2,
            learning_rate=1e-2,
            logging_steps=1,
            eval_strategy="epoch",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
            **options,
        )
        data = rows(kind)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        logs.append([entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history[:-1]])
        trainer.save_model(str(tmp_path / f"saved{index}"))
    assert logs[0] == pytest.approx(logs[1], rel=2e-3)
    assert logs[0][-1] < logs[0][0]
    # Weights are compared by the loss after the last step: Adam moves those without gradient by rounding errors.
    assert "eval_loss" in trainer.state.log_history[-2]


def test_trunk_alone_has_no_loss() -> None:
    assert not GPTJModel.accepts_loss_kwargs
    assert GPTJForCausalLM.accepts_loss_kwargs
