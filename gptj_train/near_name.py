"""The name that was probably meant by a path that does not exist."""

from __future__ import annotations

import difflib
import os
import re


def near_name(path: str) -> str:
    """Return "did you mean ...?; " with the most similar name in the folder of a path that does not exist."""
    # A path as Windows writes it, whose drives are folders in its Linux subsystem.
    unix = re.sub(r"^([A-Za-z]):", lambda drive: f"/mnt/{drive[1].lower()}", path.replace("\\", "/"))
    if unix != path and os.path.exists(unix):
        return f"did you mean {unix!r}?; "
    folder, name = os.path.split(path.rstrip("/"))
    try:
        names = os.listdir(folder or ".")
    except OSError:
        return ""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return f"did you mean {os.path.join(folder, near[0])!r}?; " if near else ""
