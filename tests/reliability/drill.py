"""Kill a training run again and again; it must come out bit for bit as if nothing had happened.

    python tests/reliability/drill.py --kills 50 --seed 1 [--report FILE]

Each round trains a toy GPT-J (bf16, ZeRO-3, all offloaded, dropout) under the deepspeed launcher on 1, 2 or 4 ranks.
Half of the kills come at a random time, half at a point inside the save; one rank dies, or all. The round's last
checkpoint and all its losses are then compared with an undisturbed run that changes its ranks at the same steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from drill_worker import POINTS, SAVE_EVERY
from torch import Tensor

from gptj_train.metrics_file import read_metrics
from gptj_train.weights.manifest import KINDS, Manifest
from gptj_train.weights.slices import SliceReader

KILLS_A_ROUND = 10
STEPS = 60
LAUNCH_SECONDS = 300
Plan = list[tuple[int, dict[str, Any] | None]]
"""The ranks of each life and the kill that ends it."""
Result = dict[str, Any]
COMPARED = ("step", "loss", "grad_norm", "lr", "tokens")
MANY_TIMES = {"writing of a slice": 60, "opening of a file": 3, "flush of a file": 3, "flush of a folder": 2}


def launch(folder: Path, ranks: int, life: dict[str, Any]) -> int:
    """One life of a run; its exit code. Nothing of it may be left when the launcher is gone."""
    shutil.rmtree(folder / "pids", ignore_errors=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(ranks)]
    command += ["--master_port", str(port), str(Path(__file__).with_name("drill_worker.py")), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with (folder / "output.txt").open("w") as output:
        done = subprocess.run(
            [*command, json.dumps(life)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=LAUNCH_SECONDS,
            check=False,
        )
    left = [pid.read_text() for pid in (folder / "pids").glob("[0-9]") if _alive(pid.read_text())]
    assert not left, f"processes {left} outlived the launcher"
    return done.returncode


def _alive(pid: str) -> bool:
    try:
        return b"drill_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def plan_kill(chance: random.Random, ranks: int, in_save: bool) -> dict[str, Any]:
    """Who dies, and when: seconds after the ranks have met, or at a point of a save."""
    victims = chance.choice([[rank] for rank in range(ranks)] + [list(range(ranks))] * min(ranks, 2))
    if not in_save:
        return {"victims": victims, "seconds": chance.uniform(0, 1)}
    point = chance.choice(POINTS)
    times = chance.randint(1, MANY_TIMES.get(point.partition(" ")[2], 1))
    return {"victims": victims, "point": point, "save": _save_of(point) + chance.randint(0, 1), "times": times}


def plan_round(chance: random.Random, count: int, worlds: tuple[int, ...]) -> Plan:
    """Kills by turns inside the save and at any time; the number of ranks changes now and then."""
    blocks = chance.sample(worlds, len(worlds))
    ranks_of = [blocks[number * len(blocks) // count] for number in range(count)]
    return [(ranks, plan_kill(chance, ranks, in_save=number % 2 == 0)) for number, ranks in enumerate(ranks_of)]


def plan_points(first: int, count: int) -> Plan:
    """Each point of the save, with rank 0 of 2 dying there, then rank 1."""
    named = [(point, victim) for point in POINTS for victim in (0, 1)][first : first + count]
    return [(2, {"victims": [victim], "point": point, "save": _save_of(point), "times": 1}) for point, victim in named]


def _save_of(point: str) -> int:
    return 3 if "old one" in point else 1  # the third save is the first that has one to remove


def disturbed(folder: Path, plan: Plan) -> list[dict[str, Any]]:
    """Live through a plan of ranks and kills; what happened in each life."""
    happened = []
    for ranks, kill in plan:
        code = launch(folder, ranks, {"max_steps": STEPS, "until": STEPS, "kill": kill})
        lives = [json.loads(line) for line in _lines(folder / "lives.jsonl")]
        reached = max((line["step"] for line in read_metrics(folder)), default=0)
        killed = (folder / "pids" / "killed").exists()
        assert killed == (code != 0), (folder / "output.txt").read_text()[-6000:]
        happened.append({"ranks": ranks, "kill": kill, "killed": killed, "reached": reached, "lives": len(lives)})
        if not killed:
            break
    return happened


def undisturbed(folder: Path, lives: list[dict[str, int]]) -> None:
    """The same steps on the same ranks, from one launch to the next where the number of ranks changed."""
    ends = [after["start"] for after in lives[1:]] + [STEPS]
    segments: list[list[int]] = []
    for life, end in zip(lives, ends, strict=True):
        if segments and segments[-1][0] == life["ranks"]:
            segments[-1][1] = end
        elif end > life["start"]:
            segments.append([life["ranks"], end])
    for ranks, until in segments:
        code = launch(folder, ranks, {"max_steps": STEPS, "until": until})
        assert code == 0, (folder / "output.txt").read_text()[-6000:]


def compare(one: Path, other: Path) -> None:
    """Each logged loss and the last checkpoint, to the bit."""
    logged = [
        [[line[name] for name in COMPARED] for line in read_metrics(run) if "loss" in line] for run in (one, other)
    ]
    assert [line[0] for line in logged[0]] == list(range(1, STEPS + 1))
    assert logged[0] == logged[1], "losses differ"
    states = [checkpoint_content(run / "checkpoints" / f"step_{STEPS:08}") for run in (one, other)]
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        assert torch.equal(states[0][key], states[1][key]), f"{key} differs"


def checkpoint_content(folder: Path) -> dict[str, Tensor]:
    manifest = Manifest.read(folder)
    assert not manifest.damage(folder, manifest.files)
    whole = {"steps": torch.tensor(manifest.optimizer["steps"])}
    for kind in KINDS:
        with SliceReader(folder / file for file in manifest.of_kind(kind)) as reader:
            for name, shape in manifest.parameters.items():
                whole[f"{kind} {name}"] = torch.empty(torch.Size(shape).numel())
                reader.read(name, 0, whole[f"{kind} {name}"])
    return whole


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def check_lost_work(happened: list[dict[str, Any]], lives: list[dict[str, int]]) -> int:
    """The most steps that a kill cost; no more than lie between two saves."""
    most = 0
    for before, after in pairwise(happened):
        if after["lives"] > before["lives"]:
            most = max(most, before["reached"] - lives[before["lives"]]["start"])
    assert most <= SAVE_EVERY, f"a kill cost {most} steps"
    return most


def drill(kills: int, seed: int, only_points: bool = False, worlds: tuple[int, ...] = (1, 2, 4)) -> Iterator[Result]:
    """Rounds until so many kills have struck, and what has come of all so far after each of them.

    Raises:
        AssertionError: a kill did harm.
    """
    chance, began = random.Random(seed), time.monotonic()
    struck: list[dict[str, Any]] = []
    most_lost = 0
    while len(struck) < kills:
        count = min(KILLS_A_ROUND, kills - len(struck))
        plan = plan_points(len(struck), count) if only_points else plan_round(chance, count, worlds)
        with tempfile.TemporaryDirectory() as scratch:
            run, straight = Path(scratch) / "run", Path(scratch) / "straight"
            run.mkdir()
            straight.mkdir()
            happened = disturbed(run, [*plan, (plan[-1][0], None)])
            lives = [json.loads(line) for line in _lines(run / "lives.jsonl")]
            undisturbed(straight, lives)
            compare(run, straight)
            most_lost = max(most_lost, check_lost_work(happened, lives))
        struck += [{"ranks": life["ranks"], **life["kill"]} for life in happened if life["killed"]]
        yield {
            "kills, all resumed and ended bitwise equal": len(struck),
            "of these inside the save": sum("point" in kill for kill in struck),
            "of these of all ranks": sum(len(kill["victims"]) == kill["ranks"] > 1 for kill in struck),
            "on ranks": {str(ranks): sum(kill["ranks"] == ranks for kill in struck) for ranks in (1, 2, 4)},
            "most steps lost to a kill": most_lost,
            "steps between saves": SAVE_EVERY,
            "seed": seed,
            "seconds": round(time.monotonic() - began),
            "struck": struck,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", action="store_true", help="each named point of the save once for each of 2 ranks")
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    for result in drill(2 * len(POINTS) if given.points else given.kills, given.seed, given.points):
        print({name: value for name, value in result.items() if name != "struck"}, flush=True)
        if given.report:
            given.report.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
