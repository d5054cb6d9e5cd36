"""Open and parse files of a folder that somebody else wrote: no links out of it, no pipes, only plain JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from gptj_train.errors import UserError

# Python's own limit for recursion is 1000 calls. A deeper value would be read here, and break whoever copies it.
_DEEPEST = 100


def check_stays(folder: Path, file: str) -> None:
    """Check that a file, if it is there, is a regular one inside its folder, links resolved.

    Raises:
        UserError: a link to outside or to nowhere, a pipe, a device or a folder.
    """
    path = folder / file
    if not os.path.lexists(path):
        return
    # Links are resolved on both sides: the folder itself may be reached by one.
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    # A hub cache keeps models--X/snapshots/REVISION/FILE as a link to models--X/blobs/HASH.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
        raise UserError(f"{path}: refused, it is a link to outside of its folder; put the file itself there")
    # Opening a named pipe would wait forever, a device might never end.
    # A link that leads nowhere is no absent file: it may be a disk that is not mounted.
    if not real.is_file():
        raise UserError(f"{path} is not a regular file")


def read_json(path: Path, largest: int) -> Any:
    """Read a JSON file of at most ``largest`` bytes; a byte order mark is ignored.

    Raises:
        UserError: no JSON, or JSON that readers understand differently: a key given twice, NaN, deep nesting. The
            message does not name the file.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise UserError(f"it has more than {largest:,} bytes")
    return parse_json(data)


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8; otherwise as ``read_json``."""
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        _check_depth(value, _DEEPEST)
    except RecursionError:
        raise UserError("it is nested too deeply") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        # Some readers take the first, some the last: what was checked might not be what another program uses.
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"it has {twice[:100]!r} twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise UserError(f"{name} is not JSON")


def _check_depth(value: Any, left: int) -> None:
    if left == 0:
        raise UserError("it is nested too deeply")
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return
    for inner in value:
        _check_depth(inner, left - 1)
