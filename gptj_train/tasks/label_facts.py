"""What a reader must know about labelled data before a run: counts, baseline, truncated texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import shorten

import numpy as np

from gptj_train.counted import counted
from gptj_train.data.labelled import LabelledRows


def label_facts(train: LabelledRows, validation: LabelledRows | None, names: Sequence[str]) -> dict[str, str]:
    """Return facts by short name, for screen, report and model card.

    The baseline is what a constant answer reaches, the best one for the training data: a model below it has learned
    nothing.
    """
    facts = {"data": f"{counted(len(train), 'text')} to train on, {len(validation or ()):,} held out"}
    if train.labels.ndim == 1:
        counts = np.bincount(train.labels, minlength=len(names))
        facts["labels"] = f"{len(names)}: {_counted(dict(zip(names, counts.tolist(), strict=True)))}"
        tested, of_what = (train, "training") if validation is None else (validation, "held-out")
        likeliest = int(counts.argmax())
        share = (tested.labels == likeliest).mean()
        facts["baseline"] = f"accuracy {share:.3f} by always answering {names[likeliest]!r}, of the {of_what} texts"
    elif np.isin(train.labels, (0, 1)).all():
        counts = train.labels.sum(axis=0).astype(int)
        facts["labels"] = f"{len(names)}: {_counted(dict(zip(names, counts.tolist(), strict=True)))}"
    else:
        means = [f"{name} {mean:.3g}" for name, mean in zip(names, train.labels.mean(axis=0), strict=True)]
        facts["labels"] = f"{len(names)}: mean {shorten(', '.join(means), 200, placeholder=' ...')}"
    if validation is not None and train.labels.ndim == 2 and not np.isin(train.labels, (0, 1)).all():
        error = ((validation.labels - train.labels.mean(axis=0)) ** 2).mean()
        facts["baseline"] = f"mse {error:.4g} by always answering the mean, of the held-out texts"
    cut = train.truncated + (0 if validation is None else validation.truncated)
    if cut:
        rows = len(train) + len(validation or ())
        facts["truncated"] = (
            f"{cut:,} of {counted(rows, 'text')} are longer than sequence_length; their end is not read"
        )
    return facts


def _counted(counts: Mapping[str, int]) -> str:
    """List labels with the number of their texts, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    return shorten(", ".join(f"{name} {count:,}" for name, count in ordered), 200, placeholder=" ...")
