"""The function that answers from a question answering export with Transformers alone; model cards quote it."""

from __future__ import annotations

from typing import Any


def answer(model: Any, tokenizer: Any, question: str, context: str) -> str:
    """Return the span of the context that answers the question, or "" if the context holds no answer."""
    import torch

    layout = model.config.qa_layout
    ids = lambda text: tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids  # noqa: E731
    question_ids, separator = ids(question.strip())[: layout["max_question_tokens"]], ids(layout["separator"])
    context_ids, copies = ids(context), layout["context_copies"]
    room = (layout["max_length"] - 1 - len(question_ids) - copies * len(separator)) // copies
    # In byte-level BPE each character of a token stands for one byte of the text: bytes tell which characters it spans.
    byte_ends = torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(context_ids)]).cumsum(0).tolist()
    character_of = [n for n, character in enumerate(context) for _ in character.encode()]
    spans, null_score = [], float("inf")
    for begin in range(0, max(len(context_ids) - room, 0) + layout["doc_stride"], layout["doc_stride"]):
        window = context_ids[begin : begin + room]
        # "No answer" is the last token, EOS: the only one that has seen everything.
        row = question_ids + (separator + window) * copies + [tokenizer.eos_token_id]
        with torch.no_grad():
            output = model(torch.tensor([row], device=model.device))
        start, end = output.start_logits[0].float().cpu(), output.end_logits[0].float().cpu()
        null_score = min(null_score, float(start[-1] + end[-1]))
        start, end = start[-1 - len(window) : -1], end[-1 - len(window) : -1]
        for first in range(len(window)):
            ends = end[first : first + layout["max_answer_tokens"]]
            last = first + int(ends.argmax())
            spans.append((float(start[first] + end[last]), begin + first, begin + last))
    for score, first, last in sorted(spans, reverse=True):
        from_byte = byte_ends[first - 1] if first else 0
        text = context[character_of[from_byte] : character_of[byte_ends[last] - 1] + 1].strip()
        if text:
            threshold = layout["null_threshold"]
            return "" if threshold is not None and null_score - score > threshold else text
    return ""
