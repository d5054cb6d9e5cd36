"""README.md of an export: what the model is, how it was made, how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

_LOADED_BY = {
    "GPTJForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "GPTJForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "GPTJForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
}


def model_card(architecture: str, facts: Mapping[str, str]) -> str:
    """Markdown with the front matter that model hubs read, and what was done, by short names."""
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
    return " ".join(text.replace("|", "\\|").split())
