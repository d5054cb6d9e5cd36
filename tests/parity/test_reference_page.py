"""The examples of GPT-J's page in Transformers' documentation, word for word but for the name of the checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pair import build_reference
from test_ecosystem import END, byte_tokenizer
from transformers import AutoTokenizer

from gptj_train import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small checkpoint of a causal LM with its tokenizer, as Transformers writes it."""
    path = tmp_path_factory.mktemp("EleutherAI") / "gpt-j-6B"
    torch.manual_seed(0)
    reference: Any = build_reference(
        vocab_size=257, n_positions=512, eos_token_id=END, bos_token_id=END, pad_token_id=END
    )
    reference.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


def test_load_in_half_precision(folder: str) -> None:
    device = "cpu"
    model = GPTJForCausalLM.from_pretrained(
        folder,
        revision="float16",
        dtype=torch.float16,
    ).to(device)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.dtype == torch.float16


def test_generation(folder: str) -> None:
    model = GPTJForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = (
        "In a shocking finding, scientists discovered a herd of unicorns living in a remote, "
        "previously unexplored valley, in the Andes Mountains. Even more surprising to the "
        "researchers was the fact that the unicorns spoke perfect English."
    )
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids
    gen_tokens = model.generate(
        input_ids,
        do_sample=True,
        temperature=0.9,
        max_length=300,
    )
    gen_text = tokenizer.batch_decode(gen_tokens)[0]
    assert gen_text.startswith(prompt)
    assert input_ids.shape[1] < gen_tokens.shape[1] <= 300


def test_half_precision_generation_on_the_models_device(folder: str) -> None:
    model = GPTJForCausalLM.from_pretrained(folder, dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = "In a shocking finding"
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    gen_tokens = model.generate(input_ids, do_sample=True, temperature=0.9, max_length=100)
    assert tokenizer.batch_decode(gen_tokens)[0].startswith(prompt)


def test_config() -> None:
    # Initializing a GPT-J 6B configuration
    configuration = GPTJConfig()
    # Initializing a model from the configuration
    with torch.device("meta"):
        model = GPTJModel(configuration)
    # Accessing the model configuration
    configuration = model.config
    assert (configuration.hidden_size, configuration.num_hidden_layers) == (4096, 28)


def test_single_label_classification(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GPTJForSequenceClassification.from_pretrained(folder)
    inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_class_id = logits.argmax().item()
    assert model.config.id2label[predicted_class_id] in ("LABEL_0", "LABEL_1")

    # To train a model on `num_labels` classes, you can pass `num_labels=num_labels` to `.from_pretrained(...)`
    num_labels = len(model.config.id2label)
    model = GPTJForSequenceClassification.from_pretrained(folder, num_labels=num_labels)
    labels = torch.tensor([1])
    loss = model(**inputs, labels=labels).loss
    assert 0 < loss.item() < 10
    five = GPTJForSequenceClassification.from_pretrained(folder, num_labels=5)
    assert five(**inputs).logits.shape == (1, 5)


def test_multi_label_classification(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GPTJForSequenceClassification.from_pretrained(folder, problem_type="multi_label_classification")
    inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_class_ids = torch.arange(0, logits.shape[-1])[torch.sigmoid(logits).squeeze(dim=0) > 0.5]

    num_labels = len(model.config.id2label)
    model = GPTJForSequenceClassification.from_pretrained(
        folder, num_labels=num_labels, problem_type="multi_label_classification"
    )
    labels = torch.sum(
        torch.nn.functional.one_hot(predicted_class_ids[None, :].clone(), num_classes=num_labels), dim=1
    ).to(torch.float)
    loss = model(**inputs, labels=labels).loss
    assert 0 < loss.item() < 10


def test_question_answering(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GPTJForQuestionAnswering.from_pretrained(folder)
    question, text = "Who was Jim Henson?", "Jim Henson was a nice puppet"
    inputs = tokenizer(question, text, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    answer_start_index = outputs.start_logits.argmax()
    answer_end_index = outputs.end_logits.argmax()
    predict_answer_tokens = inputs.input_ids[0, answer_start_index : answer_end_index + 1]
    assert isinstance(tokenizer.decode(predict_answer_tokens, skip_special_tokens=True), str)

    # target is "nice puppet"
    target_start_index = torch.tensor([14])
    target_end_index = torch.tensor([15])
    outputs = model(**inputs, start_positions=target_start_index, end_positions=target_end_index)
    assert outputs.loss.item() > 0


def test_the_package_imports_torch_on_first_use() -> None:
    program = (
        "import sys; import gptj_train.data.workers, gptj_train.data.tokenizer; assert 'torch' not in sys.modules; "
        "from gptj_train import GPTJModel; assert 'torch' in sys.modules and 'transformers' not in sys.modules; "
        "assert 'GPTJModel' in dir(sys.modules['gptj_train'])"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
