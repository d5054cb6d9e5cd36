"""What a run reports as tokens: those that the model reads, without padding."""

from __future__ import annotations

import numpy as np
import torch

from gptj_train.data.labelled import LabelledRows
from gptj_train.tasks.classification import _collate
from gptj_train.tasks.task import count_tokens


def test_packed_windows_count_all_tokens_but_the_filling() -> None:
    batch = {
        "input_ids": torch.zeros(2, 4, dtype=torch.int64),
        "labels": torch.full((2, 4), -100),
        "document_ids": torch.tensor([[1, 1, 2, 0], [1, 0, 0, 0]]),
    }
    assert count_tokens(batch) == 4


def test_texts_count_their_own_length() -> None:
    ids = [np.array([5, 6, 7]), np.array([8])]
    rows = LabelledRows(ids, np.array([0, 1]))
    batch = _collate(rows, [0, 1, None], np.ones(2, dtype=np.float32), pad_id=9)
    assert batch["input_ids"].shape == (3, 3)
    assert count_tokens(batch) == 4
