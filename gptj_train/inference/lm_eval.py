"""A text generator under EleutherAI's lm-eval harness (https://github.com/EleutherAI/lm-evaluation-harness)."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gptj_train.errors import UserError
from gptj_train.inference.text_generator import TextGenerator

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window, make_table
except ModuleNotFoundError as error:
    raise UserError(f"the lm-eval harness is not installed ({error}): pip install -e '.[lm-eval]'") from None

_NEW_TOKENS = 256  # of a generated answer, where the task does not say


def run_tasks(
    writer: TextGenerator,
    tasks: list[str],
    include_path: str | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    output_dir: str | None,
) -> str:
    """Run tasks and return the harness's table; results.json goes to ``output_dir``.

    Raises:
        UserError: a task that the harness does not know.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=include_path)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise UserError(f"tasks: the harness knows no {', '.join(unknown)}; add a folder of yours by include_path=DIR")
    results = simple_evaluate(
        HarnessModel(writer, batch_size),
        tasks=tasks,
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
    )
    assert results is not None
    if output_dir is not None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=2, ensure_ascii=False, default=handle_non_serializable)
        (Path(output_dir) / "results.json").write_text(text + "\n", encoding="utf-8")
    return make_table(results)


class HarnessModel(TemplateLM):
    """What the harness asks of a model: log-likelihoods of given texts, and texts until a stop string."""

    def __init__(self, writer: TextGenerator, batch_size: int) -> None:
        super().__init__()
        self._writer, self._batch_size = writer, batch_size
        self._n_positions = writer.model.config.n_positions

    @property
    def eot_token_id(self) -> int:
        return self._writer.tokenizer.end_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._writer.tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, longer ones in windows that share no predicted token."""
        windows = [
            [
                ("", *make_disjoint_window(pair))
                for pair in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.eot_token_id, self._n_positions, context_len=1
                )
            ]
            for request in requests
        ]
        found = iter(self._loglikelihood_tokens([window for text in windows for window in text]))
        return [sum(next(found)[0] for _ in text) for text in windows]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For (text, context ids, continuation ids): the continuation's log-probability, and whether it is greedy."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        found: dict[int, tuple[float, bool]] = {}
        batches = list(_batches(order, self._batch_size))
        for rows in tqdm(batches, desc="log-likelihoods", unit="batch", disable=not sys.stderr.isatty()):
            continuations = [requests[row][2] for row in rows]
            whole = [(requests[row][1] + requests[row][2])[-self._n_positions - 1 :] for row in rows]
            # Padded on the left, so that the last logits are the wanted ones of every row.
            inputs, mask = self._writer.padded([ids[:-1] for ids in whole])
            logits = self._writer.model(
                inputs,
                attention_mask=mask,
                position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=max(map(len, continuations)),
            ).logits.float()
            for row, ids, own in zip(rows, continuations, logits, strict=True):
                targets = torch.tensor(ids, device=own.device)
                logs = own[len(own) - len(ids) :].log_softmax(dim=-1)
                likelihood = logs.gather(1, targets[:, None]).sum().item()
                found[row] = (likelihood, bool((logs.argmax(dim=-1) == targets).all()))
        return [found[row] for row in range(len(requests))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string or the limit; prompts that leave no room for it lose their beginning."""
        texts = []
        for options, group in groupby((request.args for request in requests), key=lambda pair: pair[1]):
            until = options.get("until") or []
            stop = [until] if isinstance(until, str) else until
            new = min(options.get("max_gen_toks", _NEW_TOKENS), self._n_positions - 1)
            drawn = ("do_sample", "temperature", "top_p", "top_k") if options.get("do_sample") else ()
            sampling = {name: options[name] for name in drawn if name in options}
            for prompts in _batches([prompt for prompt, _ in group], self._batch_size):
                ids = [
                    (self.tok_encode(prompt) or [self.eot_token_id])[new - self._n_positions :] for prompt in prompts
                ]
                texts += self._writer.complete_ids(ids, stop, max_new_tokens=new, **sampling)
        return texts


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
