"""Files named by a URL: hf://, s3://, gs://, https:// and what else ``fsspec`` opens, copied to this host once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from gptj_train.errors import UserError
from gptj_train.launch.datasets_by_name import remembered


def is_url(path: str) -> bool:
    """Return whether a path is a URL with a scheme."""
    return "://" in path


def fetched(url: str, key: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the local copies of the file, or of the files of a folder or pattern, that a URL names.

    Copies keep their names, which tell what they hold, and stay in the cache of ``datasets``.

    Args:
        key: the config key that holds the URL, for messages.
        suffixes: of the files to take from a folder.

    Raises:
        UserError: nothing there, no access, no network, or no package for the scheme.
    """
    return remembered(
        f"{url} {' '.join(suffixes)}",
        lambda: _copied(url, key, suffixes),
        said=f"{key}={url}",
        still_holds=lambda copies: all(map(os.path.exists, copies)),
    )


def _copied(url: str, key: str, suffixes: tuple[str, ...]) -> list[str]:
    # Imported here: each takes a while, and most data is on a disk.
    import fsspec
    from datasets import config

    copies = []
    try:
        files = fsspec.open_files(url, "rb")
        first = files[0] if len(files) == 1 else None
        if first is not None and not first.path.lower().endswith(suffixes) and first.fs.isdir(first.path):
            names = [name for name in sorted(first.fs.find(first.path)) if name.lower().endswith(suffixes)]
            files = fsspec.open_files([first.fs.unstrip_protocol(name) for name in names], "rb")
        for file in files:
            # Files of the same name may come from several folders.
            digest = hashlib.sha256(f"{url.partition('://')[0]}://{file.path}".encode()).hexdigest()[:24]
            name = os.path.basename(file.path).partition("?")[0]
            copy = Path(config.HF_DATASETS_CACHE) / "gptj_train" / digest / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                print(f"{key}: copying {url if len(files) == 1 else file.path} to {copy}", flush=True)
                file.fs.get_file(file.path, f"{copy}.part")
                os.replace(f"{copy}.part", copy)
            copies.append(str(copy))
    except ImportError as error:
        raise UserError(f"{key}={url}: {error}") from None
    except Exception as error:  # every file system has its own
        lines = str(error).splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"{key}={url}: cannot be fetched ({reason}); correct it, or copy the files here") from None
    return copies
