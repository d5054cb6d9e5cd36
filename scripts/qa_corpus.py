"""Write a small question-answering set in flat SQuAD form, and a tokenizer, from docstrings of the standard library.

python scripts/qa_corpus.py [FOLDER]

A context lists a function's purpose, arguments and module in random order; a third of these facts are left out. A
question asks for one of the three, so about a third of the questions have no answer. The held-out questions are about
functions that do not occur in training.
"""

import ast
import json
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from gptj_train.data.tokenizer import Tokenizer

VOCAB_SIZE = 1024
LEFT_OUT = 1 / 3
TRAINING, HELD_OUT = 20_000, 300  # questions
HELD_OUT_NAMES = 200
QUESTIONS = {
    "Purpose": "What does {} do?",
    "Arguments": "What does {} take?",
    "Module": "Where is {} defined?",
}


def functions(library: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Find public functions of the standard library, each with its facts."""
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(path.parts):
            continue
        try:
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore")))
        except (SyntaxError, ValueError):
            continue
        module = ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
        for node in nodes:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            docstring = " ".join((ast.get_docstring(node) or "").split())
            sentence = re.match(r".*?\.(?= |$)", docstring)
            arguments = [argument.arg for argument in node.args.args if argument.arg != "self"]
            if arguments and sentence and 15 < len(sentence[0]) < 80:
                yield node.name, {"Purpose": sentence[0], "Arguments": ", ".join(arguments), "Module": module}


def question(number: str, name: str, facts: dict[str, str], draw: random.Random) -> dict[str, object]:
    """Make a record: a context about a function, and a question."""
    shown = [fact for fact in draw.sample(sorted(facts), len(facts)) if draw.random() > LEFT_OUT]
    context = "\n".join([name, *(f"{fact}: {facts[fact]}" for fact in shown)])
    asked = draw.choice(sorted(facts))
    answers: dict[str, list[object]] = {"text": [], "answer_start": []}
    if asked in shown:
        cue = f"\n{asked}: "
        answers = {"text": [facts[asked]], "answer_start": [context.index(cue) + len(cue)]}
    return {"id": number, "question": QUESTIONS[asked].format(name), "context": context, "answers": answers}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data/qa")
    warnings.simplefilter("ignore")  # about escape sequences in the library
    draw = random.Random(0)
    known = dict(functions(Path(sysconfig.get_path("stdlib"))))
    names = draw.sample(sorted(known), len(known))
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    for split, count, chosen in (
        ("train", TRAINING, names[HELD_OUT_NAMES:]),
        ("validation", HELD_OUT, names[:HELD_OUT_NAMES]),
    ):
        asked = [draw.choice(chosen) for _ in range(count)]
        records = [question(f"{split}-{number}", name, known[name], draw) for number, name in enumerate(asked)]
        lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        (folder / f"{split}.jsonl").write_text(lines + "\n", encoding="utf-8")
        if split == "train":
            texts = [f"{record['question']}\n{record['context']}\n" for record in records[:4000]]
            Tokenizer.train(texts, VOCAB_SIZE).save(folder / "tokenizer")
    print(f"{folder}: {TRAINING} training and {HELD_OUT} held-out questions about {len(names)} functions")


if __name__ == "__main__":
    main()
