"""The name that was probably meant by a path that does not exist."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path


def near_name(path: str | Path) -> str:
    """Return "did you mean ...?; " with the most similar path that exists, else an empty text."""
    path = str(path)
    if os.path.exists(path):
        return ""
    # A path as Windows writes it, whose drives are folders in its Linux subsystem.
    unix = re.sub(r"^([A-Za-z]):", lambda drive: f"/mnt/{drive[1].lower()}", path.replace("\\", "/"))
    if unix != path and os.path.exists(unix):
        return f"did you mean {unix!r}?; "
    # The part of the path down to its first wrong name.
    wrong = Path(path)
    while not wrong.parent.exists():
        wrong = wrong.parent
    try:
        names = os.listdir(wrong.parent)
    except OSError:
        return ""
    near = difflib.get_close_matches(wrong.name, names, n=1, cutoff=0.75)
    if not near:
        return ""
    meant = wrong.parent / near[0] / Path(path).relative_to(wrong)
    return f"did you mean {str(meant if meant.exists() else wrong.parent / near[0])!r}?; "
