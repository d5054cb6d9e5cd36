"""Write the quickstart's Pile-style corpus and tokenizer, from text in every Python installation.

python scripts/quickstart_corpus.py [FOLDER]
"""

import ast
import hashlib
import json
import pydoc_data.topics
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from gptj_train.data.tokenizer import Tokenizer

VOCAB_SIZE = 2048
BYTES_PER_COMPONENT = 3_000_000
LONGEST_DOCUMENT = 20_000  # characters; longer ones are truncated
HELD_OUT = 50  # one document in fifty


def source_code(library: Path) -> Iterator[str]:
    """Read the modules of the standard library."""
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if not {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(path.parts):
            yield path.read_text(encoding="utf-8", errors="ignore")


def docstrings(library: Path) -> Iterator[str]:
    """Join the docstrings of each module, dedented. No code runs."""
    for text in source_code(library):
        try:
            nodes = list(ast.walk(ast.parse(text)))
        except (SyntaxError, ValueError):
            continue
        kinds = ast.Module, ast.ClassDef, ast.FunctionDef
        parts = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
        text = "\n\n".join(part for part in parts if part and len(part) > 80)
        if text:
            yield text


def language_reference() -> Iterator[str]:
    """Read the topics of help()."""
    for _, text in sorted(pydoc_data.topics.topics.items()):
        yield textwrap.dedent(text).strip() + "\n"


def limited(texts: Iterator[str]) -> Iterator[str]:
    """Truncate long documents, and stop when the component has its bytes."""
    used = 0
    for text in texts:
        text = text.replace("\0", "")[:LONGEST_DOCUMENT]
        if text.strip():
            used += len(text.encode())
            yield text
        if used > BYTES_PER_COMPONENT:
            return


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data/quickstart")
    library = Path(sysconfig.get_path("stdlib"))
    components = {
        "python_source": source_code(library),
        "python_docstrings": docstrings(library),
        "python_reference": language_reference(),
    }
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    texts = []
    for name, component in components.items():
        for text in limited(component):
            # By hash: a document stays in its split when others come or go with another version of Python.
            held_out = int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELD_OUT == 0
            record = json.dumps({"text": text, "meta": {"pile_set_name": name}})
            splits["validation" if held_out else "train"].append(record)
            if not held_out:
                texts.append(text)
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    for split, records in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    Tokenizer.train(texts, VOCAB_SIZE).save(folder / "tokenizer")
    size = sum(len(record) for records in splits.values() for record in records)
    counts = " + ".join(f"{len(records)} {split}" for split, records in splits.items())
    print(f"{folder}: {counts} documents, {size / 1e6:.1f} MB, tokenizer of {VOCAB_SIZE} entries")


if __name__ == "__main__":
    main()
