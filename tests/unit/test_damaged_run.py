"""Damage to a run folder outside its checkpoints: records never end a run, and any doubt about the state does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_ranks import save

from gptj_train.errors import UserError
from gptj_train.export.from_checkpoint import _settings
from gptj_train.launch.run_folder import RunFolder
from gptj_train.launch.run_status import RunStatus, is_done
from gptj_train.metrics_file import read_metrics
from gptj_train.training.retention import resume_candidates

LINES = [{"step": step, "loss": 2.0, "kind": "train"} for step in range(1, 11)]
REQUEST = {"max_steps": 10}


def make_run(run: Path) -> None:
    """Write a run that is done at step 10, with checkpoints of steps 5 and 10."""
    save(run, 5, 10)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    with RunStatus(run, 0, REQUEST) as status:
        status.step = lambda: 10
    (run / ".lock").write_text('{"host": "here", "pid": 1, "started": "now"}\n')


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).write_bytes(content)

    return damage


def flip(name: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        content = bytearray((run / name).read_bytes())
        content[len(content) // 2] ^= 4
        (run / name).write_bytes(content)

    return damage


def flip_state(run: Path) -> None:
    status = run / "status.json"
    status.write_bytes(status.read_bytes().replace(b'"done"', b'"dond"'))


def pipe(name: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).unlink()
        os.mkfifo(run / name)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def link(name: str, target: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.symlink_to(target)

    return damage


def move_and_link(run: Path) -> None:
    (run / "checkpoints").rename(run.parent / "disk")
    (run / "checkpoints").symlink_to(run.parent / "disk")


def file_named_like_a_step(run: Path) -> None:
    (run / "checkpoints" / "step_00000020").touch()


def pipe_named_like_a_step(run: Path) -> None:
    os.mkfifo(run / "checkpoints" / "step_00000020")


def forbid(run: Path) -> None:
    """As for a user who is not root: what root may do anyway is asked for by ``os.access``."""
    (run / "checkpoints").chmod(0)


SOUND = "resumes from step 10; 10 lines of metrics; done"
RUN_DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (lambda run: None, SOUND),
    "metrics.jsonl missing": (remove("metrics.jsonl"), "resumes from step 10; 0 lines of metrics; done"),
    "metrics.jsonl empty": (write("metrics.jsonl", b""), "resumes from step 10; 0 lines of metrics; done"),
    "metrics.jsonl, a bit flipped": (flip("metrics.jsonl"), "resumes from step 10; 9 lines of metrics; done"),
    "metrics.jsonl a pipe": (pipe("metrics.jsonl"), "resumes from step 10; 0 lines of metrics; done"),
    "metrics.jsonl of nesting": (
        write("metrics.jsonl", b"[" * 10**6 + b"\n" + json.dumps(LINES[0]).encode() + b"\n"),
        "resumes from step 10; 1 lines of metrics; done",
    ),
    "status.json missing": (remove("status.json"), "resumes from step 10; 10 lines of metrics; not done"),
    "status.json, a bit flipped": (flip_state, "resumes from step 10; 10 lines of metrics; not done"),
    "status.json a pipe": (pipe("status.json"), "resumes from step 10; 10 lines of metrics; not done"),
    "status.json huge": (write("status.json", b" " * 10**6), "resumes from step 10; 10 lines of metrics; not done"),
    "lock of a run that ended": (lambda run: None, SOUND),
    "lock of nonsense": (write(".lock", b"\xff\x00{"), SOUND),
    "lock a pipe": (pipe(".lock"), "refused: RUN/.lock is not an ordinary file; remove it"),
    "lock a link": (link(".lock", "/etc/hostname"), "refused: RUN/.lock is not an ordinary file; remove it"),
    "checkpoints a link to another disk": (move_and_link, SOUND),
    "checkpoints a link to nowhere": (
        link("checkpoints", "/not/mounted"),
        "refused: RUN/checkpoints is a link to /not/mounted, which does not exist; is its disk mounted?",
    ),
    "checkpoints a link to itself": (link("checkpoints", "checkpoints"), "refused: "),
    "a file named like a step": (file_named_like_a_step, SOUND),
    "a pipe named like a step": (pipe_named_like_a_step, SOUND),
    "checkpoints without permissions": (
        forbid,
        "refused: RUN/checkpoints cannot be read and written; correct its permissions",
    ),
    "a stop file": (write("STOP", b""), "refused: RUN/STOP stops this run; remove it to resume"),
}


def outcome_of(run: Path) -> str:
    """Return what a start of the same command would do with a run folder, up to the load."""
    try:
        folder = RunFolder(str(run), rank=0)
        folder.create()
        step = int(resume_candidates(run, "auto")[0].name.removeprefix("step_"))
    except UserError as error:
        return f"refused: {str(error).replace(str(run), 'RUN')}"
    lines = len(read_metrics(run))
    return f"resumes from step {step}; {lines} lines of metrics; {'done' if is_done(run, REQUEST) else 'not done'}"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("good") / "run"
    make_run(run)
    return run


@pytest.mark.parametrize("kind", RUN_DAMAGES)
def test_what_comes_of_a_damaged_run_folder(
    kind: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(good, run)
    damage, expected = RUN_DAMAGES[kind]
    damage(run)
    access = os.access
    # root may read every folder: whoever runs the tests, permissions count.
    monkeypatch.setattr(os, "access", lambda path, mode: os.stat(path).st_mode & 0o700 != 0 and access(path, mode))
    found = outcome_of(run)
    (run / "checkpoints").chmod(0o700) if kind == "checkpoints without permissions" else None
    assert found == expected or (expected == "refused: " and found.startswith(expected))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- list\n", "holds no settings; restore the file that the run wrote, or remove it"),
        ("a: [1, 2", "cannot be read: "),
        ("a: ${b}\nb: !!python/object/apply:os.mkdir [x]", "cannot be read: "),
        ("\x00", "cannot be read: "),
    ],
)
def test_an_export_refuses_a_config_that_is_none(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError) as refused:
        _settings(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}/config.yaml {message}")
    assert "\n" not in str(refused.value)
