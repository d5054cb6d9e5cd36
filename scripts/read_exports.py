"""Read exports with the Transformers that is on the path, and compare its logits with those of our own model.

python scripts/read_exports.py EXPORT [EXPORT ...]      (an adapter folder, too, if peft is installed)

Another version of Transformers goes before the installed one:

pip install --no-deps --target old transformers==4.40.2 tokenizers==0.19.1 huggingface-hub==0.23.5
PYTHONPATH=old python scripts/read_exports.py runs/mine/export
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

import gptj_train
from gptj_train.data.tokenizer import Tokenizer

TEXT = "def hello(name):\n    return 'Grüße' + name"
AUTO_CLASSES = {
    "GPTJForCausalLM": "AutoModelForCausalLM",
    "GPTJForSequenceClassification": "AutoModelForSequenceClassification",
    "GPTJForQuestionAnswering": "AutoModelForQuestionAnswering",
}


def numbers(output: object) -> torch.Tensor:
    """Return the logits of either library's output, fp32."""
    found = output.start_logits if hasattr(output, "start_logits") else output.logits  # type: ignore[attr-defined]
    return found.detach().float()


def read(folder: Path) -> str:
    """Load an export in both libraries and return what they agree in."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    ours = getattr(gptj_train, name).from_pretrained(folder, dtype=torch.float32).eval()
    theirs = getattr(transformers, AUTO_CLASSES[name]).from_pretrained(folder).float().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT).input_ids
    same_ids = ids == Tokenizer.load(folder).encode(TEXT)
    batch = torch.tensor([ids])
    difference = (numbers(ours(batch)) - numbers(theirs(batch))).abs().max().item()
    facts = [name, f"equal ids: {same_ids}", f"largest difference of logits: {difference:.2g}"]
    facts.append(f"{tokenizer.model_max_length} tokens, padded on the {tokenizer.padding_side}")
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": "Hello"}]
        facts.append(repr(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)))
    return "; ".join(facts)


def read_adapter(folder: Path) -> str:
    """Load adapters on their base by PEFT and compare with the merged export beside them."""
    from peft import PeftModel

    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder).float().eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder.with_name("export")).float().eval()
    batch = torch.tensor([transformers.AutoTokenizer.from_pretrained(folder)(TEXT).input_ids])
    found, expected = numbers(model(input_ids=batch)), numbers(merged(input_ids=batch))
    return f"differs from the merged export by {(found - expected).abs().max():.2g} of {expected.abs().max():.2g}"


def main() -> None:
    print(f"transformers {transformers.__version__}")
    for folder in map(Path, sys.argv[1:]):
        is_adapter = (folder / "adapter_config.json").is_file()
        print(f"{folder}: {read_adapter(folder) if is_adapter else read(folder)}", flush=True)


if __name__ == "__main__":
    main()
