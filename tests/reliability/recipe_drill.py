"""Kill the real command at every stage of its life; it must come out bit for bit as if nothing had happened.

    python tests/reliability/recipe_drill.py --kills 20 --seed 1 [--stages imports load ...] [--report FILE]
    python tests/reliability/recipe_drill.py --kills 20 --change-ranks

drill.py kills ranks while they train and save. Here recipes/clm.py runs under deepspeed, torchrun or plain python, and
what dies is a rank, all of them, the launcher, the process under it, or everything at once: during imports, the
preparation of data, the compilation of DeepSpeed's optimizer, the load, training and the export. Whatever outlives a
kill must end by itself. Each round is compared with an undisturbed run: every line of metrics.jsonl, the last
checkpoint, and the bytes of the export; nothing else may be left in the folder. With --change-ranks each start draws
its launcher, and with it 1 or 2 ranks: sums are then made in another order, and losses are compared within a tolerance.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from drill import checkpoint_content

from gptj_train.data.tokenizer import Tokenizer
from gptj_train.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STEPS, SAVE_EVERY = 60, 5
KILLS_A_ROUND = 6
LIFE_SECONDS = 1800  # a compilation on a busy machine takes many minutes
ORPHAN_SECONDS = 240  # for the imports of ranks whose launcher died meanwhile, on a busy machine
LAUNCHERS = {
    "python": [sys.executable],
    "deepspeed": [str(BIN / "deepspeed"), "-q", "--num_gpus", "2", "--master_port", "{port}"],
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", "{port}"],
}
# Seconds after the stage has begun within which the kill comes.
STAGES = {"imports": 4.0, "preparation": 0.5, "compilation": 20.0, "load": 3.0, "training": 1.0, "export": 0.1}
VICTIMS = {
    "python": ["a rank"],
    "deepspeed": ["a rank", "all ranks", "the launcher", "launch.py", "everything"],
    "torchrun": ["a rank", "all ranks", "the launcher", "everything"],
}
# Relative to the loss, in bf16, as tests/distributed/test_resume.py has it for a changed number of ranks.
LOSS_TOLERANCE = 2e-3
RECORDED = ("step", "kind", "loss", "grad_norm", "lr", "tokens", "eval_loss")
RUN_FILES = {"checkpoints", "export", "config.yaml", "environment.json", "export_report.json", "metrics.jsonl"}
RUN_FILES |= {"report.html", "status.json"}
MARK = "GPTJ_TRAIN_DRILL"
Kill = dict[str, Any]


def make_inputs(folder: Path) -> None:
    """Write texts, which take some seconds to tokenize, and a tokenizer."""
    chance = random.Random(0)
    words = ["one", "for", "sorrow", "two", "joy", "three", "a", "girl", "four", "boy", "five", "silver", "six", "gold"]
    with (folder / "train.jsonl").open("w") as file:
        for _ in range(4000):
            file.write(json.dumps({"text": " ".join(chance.choices(words, k=60))}) + "\n")
    (folder / "tokenizer").mkdir()
    Tokenizer.train([" ".join(words)], 300).save(folder / "tokenizer")


def command(folder: Path, launcher: str, *overrides: str) -> list[str]:
    """Return the command line of a run in ``folder/run``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    tiny = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.rotary_dim=4", "model.vocab_size=300"]
    short = ["model.n_positions=16", "sequence_length=16", "global_batch_size=2", "micro_batch_size=1"]
    life = [f"max_steps={STEPS}", f"save_every={SAVE_EVERY}", "eval_every=20", "optim.lr=1e-3", "hang_timeout=120"]
    paths = [
        f"output_dir={folder}/run",
        f"tokenizer={folder.parent}/tokenizer",
        f"data.train={folder.parent}/train.jsonl",
        f"data.cache_dir={folder}/cache",
    ]
    arguments = [*tiny, *short, *life, *paths, "data.validation=null", "sample_prompt=null"]
    started_by = [part.format(port=port) for part in LAUNCHERS[launcher]]
    return [*started_by, str(ROOT / "recipes" / "clm.py"), "+config=quickstart", *arguments, *overrides]


class Life:
    """One start of the command, in a process group of its own."""

    def __init__(self, folder: Path, launcher: str, *overrides: str, extensions: Path | None = None) -> None:
        self.folder, self.launcher = folder, launcher
        self.run = folder / "run"
        self.extensions = extensions
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        if extensions is not None:
            environment["TORCH_EXTENSIONS_DIR"] = str(extensions)
        self.before = self.step()
        self._mark = f"{folder} {time.time()}"
        environment[MARK] = self._mark
        self.output = folder / "output.txt"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                command(folder, launcher, *overrides),
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started = time.time()

    def step(self) -> int:
        return max((line["step"] for line in read_metrics(self.run)), default=0)

    def members(self) -> list[psutil.Process]:
        """All processes of this life, orphans too: by an environment variable, since torchrun's ranks have sessions."""
        found = []
        for process in psutil.process_iter():
            try:
                is_member = process.environ().get(MARK) == self._mark
                if is_member and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        parents = {process.pid for process in self.members()}
        ranks = []
        for process in self.members():
            try:
                words = process.cmdline()
                of_launcher = self.launcher == "python" or process.ppid() in parents
                # The launchers' own command lines have the recipe too, after the launcher's name.
                if len(words) > 2 and any(word.endswith("clm.py") for word in words[1:3]) and of_launcher:
                    ranks.append(process)
            except psutil.Error:
                continue
        return ranks

    def has_reached(self, stage: str) -> bool:
        if stage == "imports":
            return len(self.ranks()) == (1 if self.launcher == "python" else 2)
        if stage == "preparation":
            return any(self.folder.glob("cache/.*.tmp"))
        if stage == "compilation":
            return self.extensions is not None and (self.extensions / "cpu_adam" / "lock").exists()
        if stage == "load":
            status = self.run / "status.json"
            return status.exists() and status.stat().st_mtime >= self.started
        if stage == "training":
            return self.step() > self.before
        return any(self.run.glob(".export.*.tmp"))

    def wait_until(self, condition: Callable[[], bool], poll: float = 0.02) -> bool:
        """Return whether it came true before the command ended."""
        deadline = time.monotonic() + LIFE_SECONDS
        while self.process.poll() is None:
            if condition():
                return True
            assert time.monotonic() < deadline, self.output.read_text()[-6000:]
            time.sleep(poll)
        return False

    def kill(self, victim: str) -> bool:
        """Send SIGKILL; return whether there was somebody to get it."""
        ranks = self.ranks()
        victims = {
            "everything": self.members,
            "the launcher": lambda: [psutil.Process(self.process.pid)],
            "launch.py": lambda: psutil.Process(self.process.pid).children(),
            "all ranks": lambda: ranks,
            "a rank": lambda: ranks[-1:],
        }[victim]()
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):  # it went with one before it
                process.kill()
        return bool(victims)

    def programs(self) -> list[psutil.Process]:
        """The Python processes of this life. Compilers end by themselves; the next start must wait for them."""
        return [process for process in self.members() if process.name().startswith(("python", "deepspeed", "torchrun"))]

    def ended(self) -> float:
        """Wait until no program is left; return the seconds that took."""
        began = time.monotonic()
        while self.process.poll() is None or self.programs():
            if time.monotonic() > began + ORPHAN_SECONDS:
                left = [" ".join(process.cmdline()) for process in self.programs()]
                raise AssertionError(f"left: {left}; {self.output.read_text()[-6000:]}")
            time.sleep(0.1)
        return time.monotonic() - began


def live(folder: Path, launcher: str, kill: Kill | None, extensions: Path | None = None) -> dict[str, Any]:
    """One life, with its kill or to its end; return what happened."""
    if kill is not None and kill["stage"] == "preparation":
        shutil.rmtree(folder / "cache", ignore_errors=True)
    life = Life(folder, launcher, extensions=extensions)
    struck = False
    try:
        if kill is not None and life.wait_until(partial(life.has_reached, kill["stage"])):
            time.sleep(kill["delay"])
            struck = life.process.poll() is None
            if struck:
                struck = life.kill(kill["victim"])
        if not struck:
            life.process.wait(LIFE_SECONDS)
        seconds = life.ended()
    finally:
        for process in life.programs():
            process.kill()
    text = life.output.read_text()
    assert struck or life.process.returncode == 0, text[-6000:]
    # A killed deepspeed command dies by the signal; what its ranks say is one line.
    assert "AssertionError" not in text, text[-6000:]
    happened = {"launcher": launcher, "kill": kill, "struck": struck, "steps": [life.before, life.step()]}
    return happened | {"orphans ended after": round(seconds, 1)}


def plan_round(
    chance: random.Random, launchers: list[str], stages: list[str], count: int
) -> list[tuple[str, Kill | None]]:
    """The launcher and the kill of each life, the last of which has none.

    Stages come in their order, so that the run lives to see the last of them.
    """
    lives: list[tuple[str, Kill | None]] = []
    for stage in sorted((stages[number % len(stages)] for number in range(count)), key=list(STAGES).index):
        launcher = chance.choice(launchers)
        delay = chance.uniform(0, STAGES[stage])
        lives.append((launcher, {"stage": stage, "victim": chance.choice(VICTIMS[launcher]), "delay": delay}))
    return [*lives, (chance.choice(launchers), None)]


def record(run: Path) -> list[list[Any]]:
    """The lines of metrics.jsonl, without times."""
    return [[line.get(name) for name in RECORDED] for line in read_metrics(run)]


def compare(run: Path, straight: Path) -> None:
    """Assert that a disturbed run ended as the undisturbed one."""
    assert record(run) == record(straight), "metrics.jsonl differs"
    contents = [checkpoint_content(folder / "checkpoints" / f"step_{STEPS:08}") for folder in (run, straight)]
    assert contents[0].keys() == contents[1].keys()
    for key in contents[0]:
        assert torch.equal(contents[0][key], contents[1][key]), f"{key} differs"
    weights = [
        hashlib.sha256((folder / "export/model.safetensors").read_bytes()).digest() for folder in (run, straight)
    ]
    assert weights[0] == weights[1], "the exports differ"
    check_folder(run)


def compare_closely(run: Path, straight: Path) -> float:
    """Assert that a run on changing ranks ended as one on 2; return the largest relative difference of a loss."""
    lines, expected = read_metrics(run), read_metrics(straight)
    for name in ("step", "kind", "lr", "tokens"):
        assert [line.get(name) for line in lines] == [line.get(name) for line in expected], f"{name} differs"
    pairs = [(line["loss"], other["loss"]) for line, other in zip(lines, expected, strict=True) if "loss" in line]
    assert len(pairs) == STEPS
    difference = max(abs(loss - other) / other for loss, other in pairs)
    assert difference <= LOSS_TOLERANCE, f"losses differ by {difference}"
    contents = [checkpoint_content(folder / "checkpoints" / f"step_{STEPS:08}") for folder in (run, straight)]
    assert contents[0].keys() == contents[1].keys()
    assert torch.equal(contents[0]["steps"], contents[1]["steps"])
    assert (run / "export/model.safetensors").exists()
    check_folder(run)
    return float(difference)


def check_folder(run: Path) -> None:
    """Assert that the run says it is done, and that nothing temporary is left."""
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    visible = {path.name for path in run.iterdir() if path.name != ".lock"}
    assert visible <= RUN_FILES, f"left in the run folder: {visible - RUN_FILES}"
    left = [str(path) for path in run.parent.rglob(".*") if path.name.endswith((".tmp", ".old", ".removed"))]
    assert left == [], f"left: {left}"


def drill(
    kills: int, seed: int, stages: list[str], launchers: list[str], change_ranks: bool = False
) -> Iterator[dict[str, Any]]:
    """Rounds until so many kills have struck; yield what has come of all so far after each round.

    Raises:
        AssertionError: a kill did harm.
    """
    chance, began = random.Random(seed), time.monotonic()
    struck: list[dict[str, Any]] = []
    rounds, difference = 0, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        make_inputs(place)
        while len(struck) < kills:
            launcher = launchers[rounds % len(launchers)]
            is_single = launcher == "python" and not change_ranks
            straight = place / f"straight-{'1' if is_single else '2'}"
            if not straight.exists():
                straight.mkdir()
                live(straight, "python" if is_single else "deepspeed", None)
            folder = place / f"round-{rounds}"
            folder.mkdir()
            extensions = None
            if "compilation" in stages:
                extensions = folder / "extensions"
                extensions.mkdir()
            count = min(KILLS_A_ROUND, kills - len(struck))
            for start_by, kill in plan_round(chance, launchers if change_ranks else [launcher], stages, count):
                happened = live(folder, start_by, kill, extensions)
                struck += [happened] if happened["struck"] else []
            if change_ranks:
                difference = max(difference, compare_closely(folder / "run", straight / "run"))
            else:
                compare(folder / "run", straight / "run")
            shutil.rmtree(folder)
            rounds += 1
            outcome = (
                "kills on changing ranks, all resumed" if change_ranks else "kills, all resumed and ended bitwise equal"
            )
            closeness = {"largest relative difference of a loss": difference} if change_ranks else {}
            yield {
                outcome: len(struck),
                **closeness,
                "rounds": rounds,
                "by stage": dict(Counter(life["kill"]["stage"] for life in struck)),
                "by victim": dict(Counter(life["kill"]["victim"] for life in struck)),
                "by launcher": dict(Counter(life["launcher"] for life in struck)),
                "longest until all processes had ended, seconds": max(life["orphans ended after"] for life in struck),
                "seed": seed,
                "seconds": round(time.monotonic() - began),
                "struck": struck,
            }


def explode(place: Path) -> None:
    """Resume a killed run with a learning rate that explodes; follow the advice; compare with an undisturbed run.

    Raises:
        AssertionError: the advice did not lead back, or the outcome differs.
    """
    make_inputs(place)
    run, straight = place / "run", place / "straight"
    for folder in (run, straight):
        folder.mkdir()
    live(straight, "python", None)
    first = Life(run, "python")
    assert first.wait_until(lambda: first.step() > SAVE_EVERY)  # a checkpoint is there
    first.kill("a rank")
    first.ended()
    exploding = Life(run, "python", "optim.lr=1e9", "max_skipped_steps=3")
    assert exploding.process.wait(LIFE_SECONDS) == 2, exploding.output.read_text()
    text = exploding.output.read_text()
    advice = re.search(r"^error: .*rerun the same command with (resume=\S+)$", text, re.MULTILINE)
    assert advice is not None, text
    back = Life(run, "python", advice[1])
    assert back.process.wait(LIFE_SECONDS) == 0, back.output.read_text()
    compare(run / "run", straight / "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    everyday = [stage for stage in STAGES if stage != "compilation"]
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=everyday)
    parser.add_argument("--launchers", nargs="+", choices=list(LAUNCHERS), default=list(LAUNCHERS))
    parser.add_argument("--report", type=Path)
    parser.add_argument("--change-ranks", action="store_true", help="each start draws its launcher: 1 or 2 ranks")
    parser.add_argument("--explode", action="store_true", help="a round with a learning rate that explodes, alone")
    given = parser.parse_args()
    if given.explode:
        with tempfile.TemporaryDirectory() as scratch:
            explode(Path(scratch))
        print("exploded, led back by its message, and ended bitwise equal")
        return
    for result in drill(given.kills, given.seed, given.stages, given.launchers, given.change_ranks):
        print({name: value for name, value in result.items() if name != "struck"}, flush=True)
        if given.report:
            given.report.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
