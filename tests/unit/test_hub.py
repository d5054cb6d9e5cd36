"""Models of the hub, from a small server on loopback: only what is needed is fetched, once per host."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from loopback_server import Handler, hub_environment, serving

from gptj_train.errors import UserError
from gptj_train.launch.hub import HubKeys, is_hub_id, with_local_folders

SHAS = {"main": "a" * 40, "float16": "b" * 40}
FILES = {
    "owner/gptj": ["config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "model.py", "README.md"],
    "owner/old": ["config.json", "vocab.json", "merges.txt", "pytorch_model-00001-of-00001.bin", "flax_model.msgpack"],
}


class Hub(Handler):
    """What the hub's client asks for: the description of a repository, and its files."""

    fetched: list[str]

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api":
            self._describe("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main", tree=parts[4:5] == ["tree"])
        else:
            name, commit, file = "/".join(parts[:2]), parts[3], parts[4]
            content = f"{file} of {commit}".encode()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            if self.command == "GET":
                self.fetched.append(f"{name}/{file}")
            self.answer(200, content, headers)

    do_HEAD = do_GET

    def _describe(self, name: str, revision: str, *, tree: bool) -> None:
        sha = {**SHAS, **{sha: sha for sha in SHAS.values()}}.get(revision)
        if name == "owner/gated":
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif name not in FILES:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif sha is None:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif tree:
            entries = [{"type": "file", "path": file, "size": 1, "oid": "0"} for file in FILES[name]]
            self.answer(200, json.dumps(entries).encode(), {})
        else:
            info = {"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in FILES[name]]}
            self.answer(200, json.dumps(info).encode(), {})


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    Hub.fetched = []
    with serving(Hub) as server:
        yield server


FETCH = """
import sys
from gptj_train.errors import UserError
from gptj_train.launch.hub import fetch
for wanted in sys.argv[1:]:
    name, revision, weights = wanted.split()
    try:
        print(fetch(name, "init_from", revision=None if revision == "-" else revision, weights=weights == "weights"))
    except UserError as error:
        print(error)
"""


def start(home: Path, port: int, *wanted: str) -> subprocess.Popen[str]:
    """Fetch "NAME REVISION weights|none"; in a new process, where the client reads its settings."""
    environment = os.environ | hub_environment(home, port)
    command = [sys.executable, "-c", FETCH, *wanted]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fetched(home: Path, port: int, *wanted: str) -> list[str]:
    out, err = start(home, port, *wanted).communicate(timeout=120)
    assert out, err
    return out.splitlines()


def names_in(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_what_is_needed_is_fetched_once_and_found_without_the_hub(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    # Two ranks of a host at once, then the same without a network.
    ranks = [start(tmp_path, hub.server_port, "owner/gptj - weights") for _ in range(2)]
    (folder,) = {rank.communicate(timeout=120)[0].strip() for rank in ranks}
    assert names_in(folder) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (Path(folder) / "config.json").read_text() == f"config.json of {SHAS['main']}"
    assert sorted(Hub.fetched) == [f"owner/gptj/{name}" for name in names_in(folder)]
    from_cache, not_there = fetched(tmp_path, 9, "owner/gptj - weights", "EleutherAI/gpt-j-6b float16 weights")[1:]
    assert from_cache == folder
    start_of_line = "init_from=EleutherAI/gpt-j-6b: no such folder here, and the hub cannot be reached ("
    assert not_there.startswith(start_of_line)
    assert not_there.endswith(
        "where there is a network, run 'hf download EleutherAI/gpt-j-6b --local-dir gpt-j-6b --revision float16', and "
        "give that folder"
    )


def test_revisions_kinds_of_weights_and_what_cannot_be_fetched(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    config_only, old, none, revision, gated = fetched(
        tmp_path,
        hub.server_port,
        "owner/gptj float16 none",
        "owner/old - weights",
        "owner/none - weights",
        "owner/gptj none weights",
        "owner/gated - weights",
    )
    assert names_in(config_only) == ["config.json", "tokenizer.json"]
    assert (Path(config_only) / "config.json").read_text() == f"config.json of {SHAS['float16']}"
    assert names_in(old) == ["config.json", "merges.txt", "pytorch_model-00001-of-00001.bin", "vocab.json"]
    assert none == "init_from=owner/none: no such folder here, and no such model on the hub; correct it"
    assert revision == "init_from=owner/gptj: the model has no revision 'none'; give a branch, tag or commit"
    assert gated.startswith("init_from=owner/gated: the hub asks for an agreement first; accept it on the model's page")


def test_paths_are_no_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert is_hub_id("EleutherAI/gpt-j-6b")
    for path in ("runs/base", "gpt2", "./a/b", "/a/b", "a/b/c", "~/a", "../a", "a/"):
        assert not is_hub_id(path)


def test_a_revision_without_an_id_is_refused() -> None:
    with pytest.raises(UserError, match=r"revision=x: it belongs to a hub id"):
        with_local_folders(HubKeys(revision="x"), weights=True)
