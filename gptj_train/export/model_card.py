"""Write the README.md of an export: the model, its training, its results, and how to load it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

from gptj_train.export import qa_answer

# Transformers class -> the auto class that loads it, and the hub's name of the task. Question answering has a name on
# the hub, but Transformers 5 has no pipeline of it: a tag would offer what fails.
_LOADED_BY = {
    "GPTJForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "GPTJForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "GPTJForQuestionAnswering": ("AutoModelForQuestionAnswering", None),
}


_QA_LAYOUT = """The input is "question, separator, context, EOS" in tokens. The last token, EOS, stands for "no answer".
That is not BERT's layout: code made for it misses the questions without an answer. `qa_layout` in config.json holds
the sizes, which this function uses.

"""


@dataclass(frozen=True)
class CardFacts:
    """What a model card says besides the architecture.

    Attributes:
        table: about data, training and evaluation, by short name; one row of a table each.
        base: hub id or folder name of the weights that training started from; None: random weights.
        license, language: as the hub writes them; None leaves them out.
        datasets: names of the training data.
        results: metrics of the last evaluation.
        adapter: the folder holds LoRA adapters only.
        chat: the tokenizer has a chat template.
    """

    table: Mapping[str, str]
    base: str | None = None
    license: str | None = None
    language: str | None = None
    datasets: tuple[str, ...] = ()
    results: Mapping[str, float] = field(default_factory=dict)
    adapter: bool = False
    chat: bool = False


def model_card(architecture: str, facts: CardFacts) -> str:
    """Return a model card in Markdown, with the front matter that model hubs read."""
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.table.items())
    versions = ", ".join(f"{name} {version(name)}" for name in ("gptj_train", "torch", "deepspeed"))
    what = "LoRA adapters for" if facts.adapter else "Fine-tuned"
    return f"""---
{_front_matter(architecture, facts)}---

# {what} {architecture}, by gptj_train

| | |
|---|---|
{table}
| made with | {versions} |

{_example(architecture, facts)}
The folder holds weights and settings only; no code in it runs.
"""


def _front_matter(architecture: str, facts: CardFacts) -> str:
    """Return YAML with one key a line; values are JSON, which is YAML."""
    _, pipeline = _LOADED_BY[architecture]
    values: dict[str, object] = {"library_name": "peft" if facts.adapter else "transformers"}
    if pipeline is not None:
        values["pipeline_tag"] = pipeline
    if facts.base is not None:
        values["base_model"] = facts.base
        values["base_model_relation"] = "adapter" if facts.adapter else "finetune"
    if facts.license is not None:
        values["license"] = facts.license
    if facts.language is not None:
        values["language"] = facts.language
    if facts.datasets:
        values["datasets"] = list(facts.datasets)
    values["tags"] = ["gptj", "lora"] if facts.adapter else ["gptj"]
    if facts.results:
        task = pipeline or "question-answering"
        metrics = [{"type": name, "value": value} for name, value in facts.results.items()]
        dataset = {"name": ", ".join(facts.datasets) or "held-out data", "type": "held-out"}
        result = {"task": {"type": task}, "dataset": dataset, "metrics": metrics}
        values["model-index"] = [{"name": "export", "results": [result]}]
    return "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())


def _example(architecture: str, facts: CardFacts) -> str:
    loader, _ = _LOADED_BY[architecture]
    load = [f"from transformers import AutoTokenizer, {loader}", "", 'folder = "this folder"']
    load.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
    load.append(f'model = {loader}.from_pretrained(folder, dtype="auto")')
    if facts.adapter:
        load.append("# peft is installed: Transformers loads the base model that adapter_config.json names.")
    text = ""
    if architecture == "GPTJForQuestionAnswering":
        text = _QA_LAYOUT
        source = inspect.getsource(qa_answer.answer).replace("  # noqa: E731", "").replace(": Any", "")
        load += ["", "", source, "", 'print(answer(model, tokenizer, "Who wrote it?", "Ada wrote it."))']
    elif architecture == "GPTJForSequenceClassification":
        load.append('logits = model(**tokenizer("a text", return_tensors="pt")).logits')
        load.append("print(model.config.id2label[logits[0].argmax().item()])")
    elif facts.chat:
        load.append('chat = [{"role": "user", "content": "Hello"}]')
        load.append(
            'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", '
            "return_dict=True)"
        )
        load.append("print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))")
    else:
        load.append('inputs = tokenizer("Once upon a time", return_tensors="pt")')
        load.append("print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))")
    return text + "```python\n" + "\n".join(load) + "\n```\n"


def _cell(text: str) -> str:
    # A bar or a line break would end the cell.
    return " ".join(text.replace("|", "\\|").split())
