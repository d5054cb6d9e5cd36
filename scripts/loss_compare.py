"""Train the quickstart's first steps at two revisions, and compare every number they give.

python scripts/loss_compare.py BASE     (or: make loss-compare BASE=REVISION)

BASE is any revision that git knows. The other side is the working tree as it is, uncommitted changes included.
Exit code 0: losses, gradient norms and exported files are equal bit for bit. 1: they differ, or a run failed.
2: BASE is no revision.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "data" / "quickstart"
STEPS = 20
RANKS = 2
NUMBERS = ("loss", "grad_norm")
LOG_TAIL = 6000  # characters of a failed run's output
WHERE_IMPORTED = "import importlib.util; print(importlib.util.find_spec('gptj_train').origin)"

Value = float | None  # metrics.jsonl has null for NaN and infinity


@dataclass(frozen=True)
class Outcome:
    """What a run gave: the numbers of each step, and the SHA-256 of each exported file."""

    steps: list[dict[str, Value]]
    files: dict[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the quickstart's first steps at BASE and in the working tree")
    parser.add_argument("base", metavar="BASE", help="revision to compare with, such as main or HEAD~1")
    revision = parser.parse_args().base
    commit = resolve(revision)
    if commit is None:
        print(f"error: BASE={revision} is no revision of this repository; see git log", file=sys.stderr)
        return 2
    # Without this a terminated comparison would leave its worktree and its ranks behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    write_corpus()
    with tempfile.TemporaryDirectory(prefix="loss-compare-") as scratch:
        folder = Path(scratch)
        with checked_out(commit, folder / "tree") as base_tree:
            base = train(base_tree, folder / "base", f"{revision} ({commit[:9]})")
        tree = train(ROOT, folder / "working", "the working tree")
    print_table(base, tree)
    difference = first_difference(base, tree)
    if difference is None:
        print(f"equal: {STEPS} steps and {len(base.files)} exported files")
        return 0
    print(f"different: {difference}")
    return 1


def resolve(revision: str) -> str | None:
    """Return the commit that a revision names, or None."""
    command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def write_corpus() -> None:
    """Write the quickstart's corpus where it is missing. Both sides read this one, so it cannot differ."""
    if not (CORPUS / "tokenizer" / "tokenizer.json").exists():
        command = [sys.executable, str(ROOT / "scripts" / "quickstart_corpus.py"), str(CORPUS)]
        subprocess.run(command, cwd=ROOT, env=environment(ROOT), check=True)


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """Check a commit out into a temporary worktree, and remove it afterwards."""
    try:
        command = ["git", "worktree", "add", "--quiet", "--detach", str(folder), commit]
        subprocess.run(command, cwd=ROOT, check=True)
        yield folder
    finally:
        # --force: the run left bytecode there.
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=False)


def environment(tree: Path) -> dict[str, str]:
    """Environment in which Python imports ``tree``'s package, and numbers depend on the code alone."""
    paths = [str(tree)]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    ours = {
        # Ahead of an editable install, which points at one tree only.
        "PYTHONPATH": os.pathsep.join(paths),
        "DS_ACCELERATOR": "cpu",
        # Sums depend on the number of threads, which a revision may choose in its own way.
        "OMP_NUM_THREADS": "1",
        # It wins over the config: a comparison is no run to track.
        "WANDB_MODE": "disabled",
    }
    return os.environ | ours


def train(tree: Path, folder: Path, title: str) -> Outcome:
    """Run the quickstart's first steps with the code of ``tree``; what it writes goes to ``folder``."""
    check_import(tree)
    print(f"training {STEPS} steps with {title}", flush=True)
    folder.mkdir()
    run = folder / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]  # the launcher's own is one for all, and may be taken by another run
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(RANKS)]
    job = ["--master_port", str(port), "recipes/clm.py", "+config=quickstart", *settings(run)]
    log = folder / "log.txt"
    if code := finish([*launcher, *job], tree, log):
        print(log.read_text(errors="replace")[-LOG_TAIL:], file=sys.stderr)
        sys.exit(f"error: training with {title} failed with exit code {code}; its output is above")
    return outcome(run, title)


def check_import(tree: Path) -> None:
    """Stop unless ``tree``'s own package is the one imported: one package, run twice, is always equal."""
    # -P: the ranks do not have the working directory on their path either.
    command = [sys.executable, "-P", "-c", WHERE_IMPORTED]
    found = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, check=True)
    origin = Path(found.stdout.strip()).resolve()
    assert origin.is_relative_to(tree.resolve()), f"{tree} would import {origin}"


def settings(run: Path) -> list[str]:
    """Overrides of the quickstart; only keys that every revision has."""
    return [
        f"output_dir={run}",
        f"max_steps={STEPS}",
        # The preset's warm-up is as long as this run, which would never see the decay after it.
        f"optim.warmup_steps={STEPS // 4}",
        f"tokenizer={CORPUS / 'tokenizer'}",
        f"data.train={CORPUS / 'train.jsonl'}",
        f"data.validation={CORPUS / 'validation.jsonl'}",
        # Each side tokenizes and packs for itself: a shared cache would hide a change there.
        f"data.cache_dir={run.parent / 'cache'}",
    ]


def finish(command: list[str], tree: Path, log: Path) -> int:
    """Run a command to its end, and return its exit code. Interrupted, leave none of its processes."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=tree,
            env=environment(tree),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group for the launcher and its ranks
        )
        try:
            return process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def outcome(run: Path, title: str) -> Outcome:
    """Read what a run gave from its folder."""
    steps = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        if all(name in metrics for name in NUMBERS):  # evaluations have lines of their own
            steps.append({name: metrics[name] for name in NUMBERS})
    if len(steps) != STEPS:
        sys.exit(f"error: {title} recorded {len(steps)} steps in metrics.jsonl, not {STEPS}")
    files = {}
    for path in [*sorted((run / "export").glob("*.safetensors")), run / "export" / "config.json"]:
        files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return Outcome(steps, files)


def first_difference(base: Outcome, tree: Outcome) -> str | None:
    """Say where two runs first differ; None where they are equal."""
    for step, (ours, theirs) in enumerate(zip(tree.steps, base.steps, strict=True), start=1):
        for name in NUMBERS:
            if ours[name] != theirs[name]:
                return f"{name} of step {step} is {theirs[name]} at BASE and {ours[name]} in the working tree"
    for name in sorted(base.files.keys() | tree.files.keys()):
        if name not in tree.files:
            return f"the working tree does not export {name}"
        if name not in base.files:
            return f"BASE does not export {name}"
        if base.files[name] != tree.files[name]:
            return f"export/{name} has other bytes; every loss and gradient norm is equal"
    return None


def print_table(base: Outcome, tree: Outcome) -> None:
    """Print both sides' numbers; a star marks a line that differs."""
    print(f"\n  {'step':>4}  {'loss: BASE':<20}{'working tree':<20}{'grad_norm: BASE':<20}working tree")
    for step, (ours, theirs) in enumerate(zip(tree.steps, base.steps, strict=True), start=1):
        columns = [str(side[name]) for name in NUMBERS for side in (theirs, ours)]
        mark = " " if ours == theirs else "*"
        print(f"{mark} {step:>4}  " + "".join(f"{column:<20}" for column in columns).rstrip())
    for name in sorted(base.files.keys() | tree.files.keys()):
        theirs_hash, ours_hash = base.files.get(name, "-"), tree.files.get(name, "-")
        mark = " " if ours_hash == theirs_hash else "*"
        print(f"{mark} {name}: sha256 {theirs_hash[:12]} at BASE, {ours_hash[:12]} in the working tree")
    print()


if __name__ == "__main__":
    sys.exit(main())
