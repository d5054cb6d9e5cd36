"""Run EleutherAI's lm-eval harness on a local model (https://github.com/EleutherAI/lm-evaluation-harness)."""

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

_MAX_GEN_TOKS = 256  # new tokens where a task does not give max_gen_toks; the default of the harness's own adapter


def run_tasks(
    generator: TextGenerator,
    *,
    tasks: list[str],
    include_path: str | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    output_dir: str | None,
) -> str:
    """Run tasks, write results.json into ``output_dir``, and return the harness's table.

    Args:
        include_path: folder of further task files.
        num_fewshot: examples before each question; None keeps the task's own number.
        limit: questions per task; None runs all.
        output_dir: None writes no file.

    Raises:
        UserError: a task that the harness does not know.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=include_path)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise UserError(f"tasks: the harness has no {', '.join(unknown)}; add your own folder with include_path=DIR")
    try:
        results = simple_evaluate(
            HarnessModel(generator, batch_size),
            tasks=tasks,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
        )
    except ConnectionError as error:
        # The harness downloads the data of its tasks, with datasets.
        raise UserError(
            f"tasks: the data of {', '.join(tasks)} cannot be fetched ({error}); run this once where there is a "
            "network, or give tasks with local files, include_path=DIR"
        ) from None
    assert results is not None  # None only on ranks other than 0, and this is one process
    if output_dir is not None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=2, ensure_ascii=False, default=handle_non_serializable)
        (Path(output_dir) / "results.json").write_text(text + "\n", encoding="utf-8")
    table: str = make_table(results)
    return table


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """The harness's model interface: log-likelihoods of given texts, and generation up to a stop string."""

    def __init__(self, generator: TextGenerator, batch_size: int) -> None:
        super().__init__()
        self._generator = generator
        self._batch_size = batch_size
        self._n_positions = generator.model.config.n_positions

    @property
    def eot_token_id(self) -> int:
        return self._generator.tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._generator.tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts; long ones are cut into windows, each token predicted once."""
        windows: list[tuple[str, list[int], list[int]]] = []
        text_of_window: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.eot_token_id, self._n_positions, context_len=1):
                context, continuation = make_disjoint_window(pair)
                windows.append(("", context, continuation))
                text_of_window.append(number)
        totals = [0.0] * len(requests)
        for number, (log_likelihood, _) in zip(text_of_window, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += log_likelihood
        return totals

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether greedy decoding would give it.

        Args:
            requests: (text, context ids, continuation ids).
        """
        # Longest first: batches of similar lengths need little padding, and running out of memory shows at once.
        order = sorted(range(len(requests)), key=lambda number: -len(requests[number][1] + requests[number][2]))
        results: dict[int, tuple[float, bool]] = {}
        batches = list(_batches(order, self._batch_size))
        for batch in tqdm(batches, desc="log-likelihoods", unit="batch", disable=not sys.stderr.isatty()):
            inputs = []
            for number in batch:
                _, context, continuation = requests[number]
                # The last token is predicted and not read: n_positions + 1 tokens fit. Long contexts lose their start.
                ids = (context + continuation)[-self._n_positions - 1 :]
                inputs.append(ids[:-1])
            # The padding is on the left, so that the last logits of every row are those of its continuation.
            input_ids, mask = self._generator.padded(inputs)
            output = self._generator.model(
                input_ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),  # padding does not count
                use_cache=False,
                logits_to_keep=max(len(requests[number][2]) for number in batch),
            )
            for number, logits in zip(batch, output.logits.float(), strict=True):
                _, _, continuation = requests[number]
                targets = torch.tensor(continuation, device=logits.device)
                log_probabilities = logits[len(logits) - len(continuation) :].log_softmax(dim=-1)
                log_likelihood = log_probabilities.gather(1, targets[:, None]).sum().item()
                is_greedy = bool((log_probabilities.argmax(dim=-1) == targets).all())
                results[number] = (log_likelihood, is_greedy)
        return [results[number] for number in range(len(requests))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each prompt up to a stop string or the limit of new tokens.

        A prompt too long for prompt and new tokens together loses its beginning.
        """
        texts: list[str] = []
        # Requests of a task share their options, and a batch must.
        for options, group in groupby((request.args for request in requests), key=lambda arguments: arguments[1]):
            until = options.get("until") or []
            stop = [until] if isinstance(until, str) else until
            max_new_tokens = min(options.get("max_gen_toks", _MAX_GEN_TOKS), self._n_positions - 1)
            sampling: dict[str, Any] = {}
            if options.get("do_sample"):
                # Tasks give temperature=0 with do_sample=false: pass these only where they count.
                for name in ("do_sample", "temperature", "top_p", "top_k"):
                    if name in options:
                        sampling[name] = options[name]
            for prompts in _batches([prompt for prompt, _ in group], self._batch_size):
                ids = []
                for prompt in prompts:
                    # An empty prompt begins like a document, after an end-of-text token.
                    prompt_ids = self.tok_encode(prompt) or [self.eot_token_id]
                    ids.append(prompt_ids[max_new_tokens - self._n_positions :])
                texts += self._generator.complete_ids(ids, stop, max_new_tokens=max_new_tokens, **sampling)
        return texts


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
