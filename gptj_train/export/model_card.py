"""Write the README.md of an export: the model, its training, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

# Transformers class -> the auto class that loads it, and the hub's name of the task.
_LOADED_BY = {
    "GPTJForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "GPTJForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "GPTJForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
}


def model_card(architecture: str, facts: Mapping[str, str]) -> str:
    """Return a model card in Markdown, with the front matter that model hubs read.

    Args:
        architecture: the Transformers class.
        facts: about data, training and evaluation, by short name; one row of a table each.
    """
    loader, pipeline = _LOADED_BY.get(architecture, ("AutoModel", "feature-extraction"))
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: {pipeline}
tags:
- gptj
---

# {architecture}, fine-tuned with gptj_train

| | |
|---|---|
{table}
| made with | gptj_train {version("gptj_train")} |

```python
from transformers import AutoTokenizer, {loader}

tokenizer = AutoTokenizer.from_pretrained("this folder")
model = {loader}.from_pretrained("this folder", dtype="auto")
```

The folder holds weights and settings only; no code in it runs.
"""


def _cell(text: str) -> str:
    # A bar or a line break would end the cell.
    return " ".join(text.replace("|", "\\|").split())
