"""Records that ``bad_records=skip`` leaves out of labelled texts and questions: counted by reason, up to a share."""

from __future__ import annotations

from collections import Counter

from gptj_train.counted import counted
from gptj_train.data.formats import say
from gptj_train.errors import UserError


def check_share(key: str, skipped: Counter[str], kept: int, largest: float) -> None:
    """Print how many records were left out, and why.

    Args:
        key: the config key that holds the files.
        skipped: reason -> number of records left out.
        kept: number of the others.
        largest: ``data.max_bad_share``.

    Raises:
        UserError: more than that share was left out.
    """
    if not skipped:
        return
    count = skipped.total()
    reasons = ", ".join(f"{number:,} x {reason}" for reason, number in skipped.most_common())
    share = count / (count + kept)
    if share > largest:
        raise UserError(
            f"{key}: {share:.2%} of the records are bad ({reasons}), more than data.max_bad_share ({largest:.2%}); "
            "data.bad_records=error names the first of them"
        )
    say(f"{key}: {count:,} of {counted(count + kept, 'record')} left out ({reasons})")
