"""Files named by a URL: hf://, s3://, gs://, https:// and what else ``fsspec`` opens, copied to this host once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from filelock import FileLock

from gptj_train.errors import UserError


def is_url(path: str) -> bool:
    """Return whether a path is a URL with a scheme."""
    return "://" in path


def fetched(url: str, key: str) -> list[str]:
    """Return the local copies of the file, or the files of a pattern, that a URL names.

    Copies keep their names, which tell what they hold, and stay in the cache of ``datasets``. The ranks of a host come
    here together: the first one downloads, and the others wait for its lock.

    Args:
        key: the config key that holds the URL, for messages.

    Raises:
        UserError: nothing there, no access, no network, or no package for the scheme.
    """
    # Imported here: each takes a while, and most data is on a disk.
    import fsspec
    from datasets.config import HF_DATASETS_CACHE

    try:
        files = fsspec.open_files(url, "rb")
        found = []
        for file in files:
            # Files of the same name may come from several folders.
            folder = hashlib.sha256(f"{url.partition('://')[0]}://{file.path}".encode()).hexdigest()[:24]
            name = os.path.basename(file.path).partition("?")[0]
            copy = Path(HF_DATASETS_CACHE) / "gptj_train" / folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(copy.parent / "download.lock"):
                if not copy.exists():
                    print(f"{key}: copying {url if len(files) == 1 else file.path} to {copy}", flush=True)
                    file.fs.get_file(file.path, f"{copy}.part")
                    os.replace(f"{copy}.part", copy)
            found.append(str(copy))
    except ImportError as error:
        raise UserError(f"{key}={url}: {error}") from None
    except Exception as error:  # every file system has its own
        lines = str(error).splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"{key}={url}: cannot be fetched ({reason}); correct it, or copy the files here") from None
    return sorted(found)
