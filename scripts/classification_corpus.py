"""Write a labelled corpus and a tokenizer: snippets of the standard library, labelled with their package.

python scripts/classification_corpus.py [FOLDER]
"""

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gptj_train.data.tokenizer import Tokenizer

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
VOCAB_SIZE = 2048
LINES = 12  # per snippet
HELD_OUT = 10  # one snippet in ten


def snippets(package: Path) -> Iterator[str]:
    """Cut the package's modules into snippets of LINES lines that do not overlap."""
    for path in sorted(package.rglob("*.py")):
        if "test" in path.parts:
            continue
        lines = path.read_text(encoding="utf-8", errors="ignore").splitlines()
        lines = [line for line in lines if line.strip()]
        for start in range(0, len(lines) - LINES + 1, LINES):
            yield "\n".join(lines[start : start + LINES])


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data/classification")
    library = Path(sysconfig.get_path("stdlib"))
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for package in PACKAGES:
        for text in sorted(set(snippets(library / package))):
            # By hash: a snippet stays in its split when others come or go with another version of Python.
            held_out = int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELD_OUT == 0
            splits["validation" if held_out else "train"].append({"text": text, "label": package})
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    for split, records in splits.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    Tokenizer.train((record["text"] for record in splits["train"]), VOCAB_SIZE).save(folder / "tokenizer")
    counts = " + ".join(f"{len(records)} {split}" for split, records in splits.items())
    print(f"{folder}: {counts} snippets of {len(PACKAGES)} packages, tokenizer of {VOCAB_SIZE} entries")


if __name__ == "__main__":
    main()
