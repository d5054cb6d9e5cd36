"""Datasets named by data.dataset: their splits become files, which the readers of all other files read."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
from loopback_server import Handler, hub_environment, serving
from text_data import jsonl

from gptj_train.config import ClassificationConfig, ClmConfig, EvaluateConfig
from gptj_train.data.corpus import prepare
from gptj_train.data.held_out_share import HeldOutShare
from gptj_train.data.labelled import prepare_labelled
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.launch.command_line import compose
from gptj_train.launch.datasets_by_name import with_dataset_files

RUN = ["output_dir=unused", "init_from=null", "max_steps=1", "tokenizer=unused"]
README = """---
configs:
- config_name: plain
  data_files:
  - split: train
    path: parts/*.jsonl
  - split: test
    path: test.jsonl
- config_name: other
  data_files: test.jsonl
---
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a cat and a dog in a red car"] * 3, vocab_size=270)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset as the hub has them, with labels that look like dates."""
    folder = tmp_path / "animals"
    jsonl(folder / "parts" / "b.jsonl", {"text": "a dog", "label": "2021-05-02"})
    jsonl(folder / "parts" / "a.jsonl", {"text": "a cat", "label": "2021-05-01"})
    jsonl(folder / "test.jsonl", {"text": "a red cat", "label": "2021-05-01"})
    (folder / "README.md").write_text(README)
    return folder


def config(cls: type, primary: str, *settings: str) -> Any:
    run = RUN if primary != "evaluate" else ["checkpoint=unused"]
    return with_dataset_files(compose(primary, [*run, *settings], cls))


def refusal(*settings: str) -> str:
    with pytest.raises(UserError, match=r"\S") as caught:
        config(ClmConfig, "clm", *settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_with_a_readme_is_read_by_all_tasks(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [f"data.dataset={folder}", "data.subset=plain", "data.validation_split=test"]
    files = [f"{folder}/parts/a.jsonl", f"{folder}/parts/b.jsonl"]
    text = config(ClmConfig, "clm", *named, f"data.cache_dir={tmp_path}/cache").data
    assert (text.train, text.validation, text.dataset) == (files, [f"{folder}/test.jsonl"], None)
    assert f"data.train: split 'train' of {folder}: {files[0]} and 1 more\n" in capsys.readouterr().out
    data = prepare(text, tokenizer, 16)
    assert [dict(data.splits[name].facts())["data"].split(",")[0] for name in data.splits] == [
        "2 documents",
        "1 document",
    ]

    labelled = config(ClassificationConfig, "classification", *named).data
    train, validation, names = prepare_labelled(
        labelled,
        problem_type="single_label_classification",
        labels=None,
        tokenizer=tokenizer,
        length=16,
        held_out=HeldOutShare(),
    )
    assert names == ["2021-05-01", "2021-05-02"]
    assert validation is not None
    assert (train.labels.tolist(), validation.labels.tolist()) == ([0, 1], [0])

    for split in ("data.split=test", "data.validation_split=test"):
        evaluated = config(EvaluateConfig, "evaluate", *named[:2], split).data
        assert (evaluated.train, evaluated.validation) == (None, [f"{folder}/test.jsonl"])


def test_saved_datasets_with_and_without_splits(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    datasets.DatasetDict({"train": rows, "dev": rows}).save_to_disk(str(tmp_path / "both"))
    rows.save_to_disk(str(tmp_path / "one"))
    data = config(ClmConfig, "clm", f"data.dataset={tmp_path}/both", "data.validation_split=dev").data
    assert (data.train, data.validation) == ([f"{tmp_path}/both/train"], [f"{tmp_path}/both/dev"])
    assert config(ClmConfig, "clm", f"data.dataset={tmp_path}/one").data.train == [f"{tmp_path}/one"]
    assert refusal(f"data.dataset={tmp_path}/one", "data.split=dev").endswith(": no split 'dev'; there are train")


def test_a_preset_makes_room_and_the_command_line_does_not(folder: Path) -> None:
    named = [f"data.dataset={folder}", "data.subset=plain"]
    assert len(config(ClmConfig, "clm", "+config=quickstart", *named).data.train) == 2
    assert config(ClmConfig, "clm", *named, "data.validation=own.jsonl").data.validation == "own.jsonl"
    said = "data.train and the split 'train' of data.dataset are both given; drop one of them"
    assert refusal(*named, "data.train=a.jsonl") == said


def test_what_is_wrong_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    named = f"data.dataset={folder}"
    assert refusal(named) == f"{named}: choose data.subset (there are 'plain', 'other')"
    assert refusal(named, "data.subset=plane") == f"{named}: choose data.subset (there are 'plain', 'other')"
    assert refusal(named, "data.subset=plain", "data.split=dev") == f"{named}: no split 'dev'; there are test, train"
    assert "a folder here, which has no revisions" in refusal(named, "data.subset=plain", "data.revision=v1")
    assert refusal("data.train=x", "data.revision=v1") == "data.revision=v1: it belongs to data.dataset=NAME"
    assert refusal(f"data.dataset={folder}s").startswith(f"{named}s: did you mean {str(folder)!r}?; no such folder")
    for file in ("test.jsonl", "parts/a.jsonl", "parts/b.jsonl", "README.md"):
        (folder / file).unlink()
    assert refusal(named).startswith(f"{named}: ")


def test_a_readme_cannot_name_files_elsewhere(folder: Path, tmp_path: Path) -> None:
    jsonl(tmp_path / "secret.jsonl", "private")
    for path in (f"{tmp_path}/secret.jsonl", "../secret.jsonl"):
        (folder / "README.md").write_text(README.replace("parts/*.jsonl", path))
        said = refusal(f"data.dataset={folder}", "data.subset=plain")
        assert "refused, its README names " in said
        assert "secret.jsonl" in said


# --- the hub, a small server on loopback ---

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
FILES = {"README.md": README, "parts/0.jsonl": '{"text": "2021-05-01"}\n', "test.jsonl": '{"text": "two"}\n'}


class Hub(Handler):
    """What ``datasets`` asks for: the description of a dataset, its folders, and its files."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        commit = COMMITS["v1" if "/v1" in path or COMMITS["v1"] in path else "main"]
        if path.startswith("/api/datasets/owner/animals"):
            _, is_tree, rest = path.partition("/tree/")
            found = self._entries(rest.partition("/")[2]) if is_tree else {"id": "owner/animals", "sha": commit}
            self.answer(200, json.dumps(found).encode(), {})
        elif path.startswith("/datasets/owner/animals/resolve/") and path.split("/", 6)[-1] in FILES:
            content = FILES[path.split("/", 6)[-1]].encode()
            self.answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
        else:
            code = "EntryNotFound" if "animals" in path else "RepoNotFound"
            self.answer(404, b"{}", {"X-Error-Code": code})

    do_HEAD = do_GET

    def _entries(self, folder: str) -> list[dict[str, Any]]:
        entries = []
        for name, content in FILES.items():
            if os.path.dirname(name) == folder:
                entries.append({"type": "file", "path": name, "size": len(content), "oid": "0" * 40})
        if folder == "":
            entries.append({"type": "directory", "path": "parts", "oid": "0" * 40})
        return entries


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    with serving(Hub) as server:
        yield server


FIND = """
import sys
from gptj_train.config import ClmConfig
from gptj_train.data.files import find_files
from gptj_train.errors import UserError
from gptj_train.launch.command_line import compose
from gptj_train.launch.datasets_by_name import with_dataset_files
try:
    data = with_dataset_files(compose("clm", sys.argv[1:], ClmConfig)).data
    for name in ("train", "validation"):
        print(name, getattr(data, name))
        for file in find_files(getattr(data, name), f"data.{name}"):
            print(file.read_text().strip())
except UserError as error:
    print("error:", error)
"""


def found(home: Path, port: int, *settings: str) -> list[str]:
    """Run in a new process, where the hub's client reads its settings."""
    environment = os.environ | hub_environment(home, port)
    command = [sys.executable, "-c", FIND, *RUN, *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_dataset_of_the_hub_is_fetched_once(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    named = ["data.dataset=owner/animals", "data.subset=plain", "data.validation_split=test", "data.revision=v1"]
    lines = found(tmp_path, hub.server_port, *named)
    url = f"hf://datasets/owner/animals@{COMMITS['v1']}"
    assert lines[0] == f"data.train: split 'train' of owner/animals: {url}/parts/0.jsonl"
    assert [line for line in lines if not line.startswith("data.")] == [
        f"train ['{url}/parts/0.jsonl']",
        FILES["parts/0.jsonl"].strip(),
        f"validation ['{url}/test.jsonl']",
        FILES["test.jsonl"].strip(),
    ]
    (line,) = found(tmp_path, hub.server_port, "data.dataset=owner/none")
    assert line.startswith("error: data.dataset=owner/none: no such folder here, and ")
    hub.shutdown()
    hub.server_close()
    again = found(tmp_path, hub.server_port, *named)
    assert again == [line for line in lines if "copying" not in line]
    (line,) = found(tmp_path, hub.server_port, "data.dataset=owner/animals")
    assert line.startswith("error: data.dataset=owner/animals: no such folder here, and ")
