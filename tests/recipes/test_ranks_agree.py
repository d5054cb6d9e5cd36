"""Two ranks that are not given the same job end before the first step, in one line, with exit code 2."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gptj_train.data.tokenizer import Tokenizer

pytestmark = pytest.mark.distributed

RECIPE = Path(__file__).parents[2] / "recipes" / "clm.py"
TEXT = "One for sorrow, two for joy, three for a girl, four for a boy. "
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agreement")
    (folder / "tokenizer").mkdir()
    Tokenizer.train([TEXT], 300).save(folder / "tokenizer")
    for number in range(2):
        # Of the same size, so that only the content tells them apart.
        text = TEXT.replace("joy", "fun") if number else TEXT
        (folder / f"host{number}").mkdir()
        (folder / f"host{number}" / "train.jsonl").write_text(json.dumps({"text": text * 20}) + "\n")
    return folder


def run(place: Path, differing: list[list[str]], output_dir: str, data: str) -> list[tuple[int, str]]:
    """Start two ranks, each in a folder of its own as if on a host of its own; return exit code and stderr of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    tiny = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.rotary_dim=4", "model.vocab_size=300"]
    short = ["model.n_positions=16", "sequence_length=16", "global_batch_size=2", "micro_batch_size=1"]
    one_step = ["max_steps=1", "eval_every=0", "save_every=0", "data.validation=null", "sample_prompt=null"]
    paths = [f"output_dir={output_dir}", f"tokenizer={place}/tokenizer", f"data.train={data}", "data.cache_dir=cache"]
    ranks = []
    for number, overrides in enumerate(differing):
        rank = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(RECIPE), "+config=quickstart", *tiny, *short, *one_step, *paths, *overrides],
                env=os.environ | rank | {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
                cwd=place / f"host{number}",
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return [(rank.wait(timeout=120), rank.communicate()[1]) for rank in ranks]


def test_other_settings_on_one_host(place: Path) -> None:
    same = f"{place}/host0/train.jsonl"
    outcomes = run(place, [[], ["optim.lr=0.5", "max_steps=2"]], f"{place}/settings", same)
    assert [code for code, _ in outcomes] == [2, 2]
    lines = outcomes[0][1].splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: the ranks do not run the same job. max_steps: 1 on ")
    assert f"optim.lr: 0.003 on {HOST} (rank 0), 0.5 on {HOST} (rank 1)" in lines[0]
    assert not (place / "settings" / "checkpoints").exists()
    assert json.loads((place / "settings" / "status.json").read_text())["state"] == "failed"


def test_other_data_on_one_host(place: Path) -> None:
    # Paths may differ: what counts is what the files hold.
    paths = [[f"data.train={place}/host{number}/train.jsonl"] for number in range(2)]
    outcomes = run(place, paths, f"{place}/data", "replaced.jsonl")
    assert [code for code, _ in outcomes] == [2, 2]
    assert outcomes[0][1].startswith("error: the ranks do not run the same job. ")
    assert "data: 1 document, " in outcomes[0][1]
    assert "data.train" not in outcomes[0][1]
    assert "training and held-out batches: " in outcomes[0][1]


def test_an_output_dir_that_each_host_has_for_itself(place: Path) -> None:
    outcomes = run(place, [[], []], "private", f"{place}/host0/train.jsonl")
    assert [code for code, _ in outcomes] == [2, 2]
    assert outcomes[0][1].startswith(
        f"error: output_dir=private is not one folder for all ranks: rank 1 on {HOST} cannot see the file that rank 0 "
        f"wrote on {HOST}; "
    )


def test_ranks_that_agree_train(place: Path) -> None:
    outcomes = run(place, [[], []], f"{place}/agreed", f"{place}/host0/train.jsonl")
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert json.loads((place / "agreed" / "status.json").read_text())["attempt"] == 1
    assert not list((place / "agreed").glob(".shared*"))
