"""Measure whether writing the context twice helps, with the cue before the answer and after it.

python benchmarks/qa_repetition.py [STEPS]

A context lists three names, each with a colour. The question asks for the name of a colour, or for a colour that the
context lacks. In "- red: name" the answer's tokens attend to their cue; in "- name (red)" they cannot. Each of the four
cases trains a small GPT-J from random weights, with plain AdamW on one CPU thread.
"""

import random
import sys
import time
from typing import Any

import torch

from gptj_train import GPTJConfig, GPTJForQuestionAnswering
from gptj_train.data.sampler import Sampler
from gptj_train.data.squad import Question
from gptj_train.data.squad_features import Features
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.tasks.question_answering import QATaskConfig, QuestionAnswering

COLOURS = ["red", "blue", "green", "white", "black"]
SYLLABLES = ["ba", "do", "fi", "ku", "la", "me", "no", "ri", "su", "te"]
FORMS = {"cue first": "- {colour}: {name}", "cue after": "- {name} ({colour})"}
LEARNING_RATE, BATCH = 2e-3, 16


def question(number: int, form: str, draw: random.Random) -> Question:
    names = ["".join(draw.choices(SYLLABLES, k=3)) for _ in range(3)]
    *shown, absent = draw.sample(COLOURS, 4)
    context = "\n".join(form.format(name=name, colour=colour) for name, colour in zip(names, shown, strict=True))
    if draw.random() < 1 / 6:
        return Question(str(number), f"Which one is {absent}?", context, (), None)
    colour, name = draw.choice(list(zip(shown, names, strict=True)))
    return Question(str(number), f"Which one is {colour}?", context, (name,), context.index(name))


def exact_match(form: str, repeat: bool, steps: int) -> tuple[float, float]:
    """Return the held-out exact match after training, and the seconds that training took."""
    torch.manual_seed(0)
    draw = random.Random(0)
    train, held_out = ([question(number, form, draw) for number in range(count)] for count in (20_000, 300))
    tokenizer = Tokenizer.train([f"{asked.question}\n{asked.context}\n" for asked in train[:2000]], 400)
    sizes: dict[str, Any] = {"doc_stride": 32, "max_question_tokens": 16, "repeat_context": repeat}
    features = [Features(questions, tokenizer, length=256, **sizes) for questions in (train, held_out)]
    config = QATaskConfig(**sizes, max_answer_tokens=16, n_best=5, null_threshold=0.0)
    task = QuestionAnswering(
        train=features[0],
        sampler=Sampler([len(features[0])], seed=0, global_batch_size=BATCH, micro_batch_size=BATCH),
        validation=features[1],
        config=config,
        batch_size=BATCH,
    )
    model = GPTJForQuestionAnswering(
        GPTJConfig(vocab_size=len(tokenizer), n_positions=256, n_embd=128, n_layer=3, n_head=4, rotary_dim=16)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    began = time.perf_counter()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * (1 - 0.9 * step / steps)
        (batch,) = task.training_batches(step, 0, 1)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began
    with torch.no_grad():
        records = []
        for held_out_batch in task.evaluation_batches(0, 1):
            output = model(**held_out_batch.inputs, num_items_in_batch=1.0)
            records += task.records(output, held_out_batch)
    return task.metrics(records)["exact_match"], seconds


def main() -> None:
    torch.set_num_threads(1)
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    for name, form in FORMS.items():
        for repeat in (False, True):
            score, seconds = exact_match(form, repeat, steps)
            print(
                f"{name}, read {'twice' if repeat else 'once '}: exact match {score:5.1f}  ({seconds:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
