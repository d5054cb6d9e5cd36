"""Adam's moments that belong to the weights of a folder: its ``adam/``, as recipes/import_mesh.py writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Size

from gptj_train.errors import UserError
from gptj_train.weights.hf_reader import HFWeights

MOMENTS = ("exp_avg", "exp_avg_sq")
"""First and second, as torch's Adam names them."""

_MOST_STEPS = 10**7


@dataclass(frozen=True)
class StoredMoments:
    """Both moments, each as a folder of weights is held, and the number of updates that made them.

    ``names`` is the stored name of each parameter that has moments.
    """

    of: Mapping[str, HFWeights]
    names: Mapping[str, str]
    steps: int


@contextmanager
def moments_beside(folder: str | Path, shapes: Mapping[str, Size], new_head: bool) -> Iterator[StoredMoments | None]:
    """Open the moments of a folder of weights; None if it has none.

    Args:
        shapes: of the parameters to train. new_head: the folder's may be another task's.

    Raises:
        UserError: files that are not moments, or not of these parameters.
    """
    place = Path(folder) / "adam"
    if not (place / "state.json").exists():
        yield None
        return
    steps = _read_steps(place / "state.json")
    with ExitStack() as stack:
        of = {moment: stack.enter_context(HFWeights(place / moment)) for moment in MOMENTS}
        names, _ = (of[moment].match(shapes, new_head=new_head) for moment in MOMENTS)
        yield StoredMoments(of, names, steps)


def write_steps(folder: Path, steps: int) -> None:
    """Into the folder of weights that has the moments' files in ``adam/exp_avg`` and ``adam/exp_avg_sq``."""
    (folder / "adam" / "state.json").write_text(json.dumps({"step": steps}) + "\n")


def _read_steps(path: Path) -> int:
    try:
        steps = json.loads(path.read_bytes())["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); without the folder adam training starts anew") from None
    if type(steps) is not int or not 0 <= steps <= _MOST_STEPS:
        raise UserError(f"{path}: step must be a whole number up to {_MOST_STEPS:,}, got {steps!r}")
    return steps
