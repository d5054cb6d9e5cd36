"""Adam's moments beside a folder of weights: its ``adam/``, as recipes/import_mesh.py writes it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Size

from gptj_train.errors import UserError
from gptj_train.untrusted_files import check_stays, read_json
from gptj_train.weights.hf_reader import HFWeights

MOMENTS = ("exp_avg", "exp_avg_sq")
"""First and second moment, as torch's Adam names them."""

# CPUAdam replays every update when its state is set; a larger number in a stranger's file would hang the run.
_MOST_STEPS = 10**7

_LARGEST_STATE = 1000  # bytes


@dataclass(frozen=True)
class StoredMoments:
    """Adam's moments in a folder.

    Attributes:
        of: "exp_avg" and "exp_avg_sq" -> a folder that holds this moment of every parameter, as weights are held.
        names: parameter -> its stored name.
        steps: the number of updates that made the moments.
    """

    of: Mapping[str, HFWeights]
    names: Mapping[str, str]
    steps: int


@contextmanager
def moments_beside(folder: str | Path, shapes: Mapping[str, Size], new_head: bool) -> Iterator[StoredMoments | None]:
    """Open the moments of a folder of weights; None if it has none.

    Args:
        shapes: of the parameters to train.
        new_head: accept moments of another task's model, without those of its head.

    Raises:
        UserError: files that are not moments, or not of these parameters.
    """
    adam = Path(folder) / "adam"
    if not os.path.lexists(adam / "state.json"):  # a link to nowhere is refused, not taken for no moments
        yield None
        return
    steps = _read_steps(adam / "state.json")
    with ExitStack() as stack:
        of = {moment: stack.enter_context(HFWeights(adam / moment)) for moment in MOMENTS}
        # Both are checked; their names agree.
        names, _ = (of[moment].match(shapes, new_head=new_head) for moment in MOMENTS)
        yield StoredMoments(of, names, steps)


def write_steps(folder: Path, steps: int) -> None:
    """Write ``adam/state.json``, beside the moments' files in ``adam/exp_avg`` and ``adam/exp_avg_sq``."""
    (folder / "adam" / "state.json").write_text(json.dumps({"step": steps}) + "\n")


def _read_steps(path: Path) -> int:
    try:
        check_stays(path.parent, path.name)
        steps = read_json(path, _LARGEST_STATE)["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove the folder adam to start Adam from zero") from None
    # bool is an int to Python, so that "true" would pass isinstance.
    if type(steps) is not int or not 0 <= steps <= _MOST_STEPS:
        raise UserError(f"{path}: step must be a whole number up to {_MOST_STEPS:,}, got {steps!r}")
    return steps
