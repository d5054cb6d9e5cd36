"""A user's mistake is one line that gives cause and remedy, and exit code 2, before anything is written."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
import zstandard

from gptj_train import GPTJConfig, finetune
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.launch.preemption import StopRequest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "clm.py"
GOOD_RECORDS = "".join(json.dumps({"text": f"document {number} of a few"}) + "\n" for number in range(20))


class StartedError(Exception):
    """The recipe accepted the request and would train."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the files of a small run, and with damaged ones."""
    (tmp_path / "tokenizer").mkdir()
    Tokenizer.train([GOOD_RECORDS], 300).save(tmp_path / "tokenizer")
    files = {
        "train.jsonl": GOOD_RECORDS,
        "empty.jsonl": "",
        "blank.jsonl": "\n  \n",
        "broken.jsonl": GOOD_RECORDS + '{"text": "no end"\n',
        "textless.jsonl": GOOD_RECORDS + '{"content": "x"}\n',
        "surrogate.jsonl": '{"text": "\\ud83d"}\n',
        "not_a_model/readme": "",
        "another_model/config.json": '{"model_type": "gpt2"}',
        "run_cut_off/checkpoints/step_00000010/weights": "",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "told_to_stop").mkdir()
    (tmp_path / "told_to_stop" / "STOP").touch()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "device.jsonl").symlink_to("/dev/zero")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    (tmp_path / "cut_off.jsonl.zst").write_bytes(zstandard.compress(GOOD_RECORDS.encode())[:-5])
    twice = pyarrow.array(["a text"])
    pyarrow.parquet.write_table(pyarrow.table([twice, twice], ["text", "text"]), tmp_path / "twice.parquet")
    (tmp_path / "closed").mkdir()
    (tmp_path / "weightless").mkdir()
    shape = GPTJConfig(vocab_size=512, n_positions=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)
    shape.save_pretrained(tmp_path / "weightless")
    return tmp_path


def arguments(place: Path, *changes: str) -> list[str]:
    """A valid command line with some changes; {} in them is the folder."""
    good = [
        "+config=quickstart",
        "output_dir={}/run",
        "tokenizer={}/tokenizer",
        "data.train={}/train.jsonl",
        "data.validation=null",
        "data.cache_dir={}/cache",
        "model.vocab_size=512",
        "sequence_length=64",
        "max_steps=1",
    ]
    return [argument.replace("{}", str(place)) for argument in (*good, *changes)]


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def clm(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run recipes/clm.py in this process up to its engine; returns exit code and stderr."""

    def started(**_: object) -> None:
        raise StartedError

    monkeypatch.setattr(finetune, "Engine", started)
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    access = os.access
    # root may read every folder: whoever runs the tests, this one is closed.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and access(path, mode))

    def run(*changes: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments(place, *changes)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(RECIPE), run_name="__main__")
        return int(caught.value.code or 0), capsys.readouterr().err

    return run


def test_without_a_mistake_it_starts(clm: Command, place: Path) -> None:
    with pytest.raises(StartedError):
        clm()
    assert not (place / "run" / "checkpoints").exists()


MISTAKES = {
    "unknown preset": (
        ["+config=quikstart"],
        "no config named 'quikstart'; did you mean quickstart? there are: classification_quickstart",
    ),
    "unknown key": (["max_step=3"], "unknown config key 'max_step'; did you mean 'max_steps'?"),
    "unknown key with a plus": (["+optim.lrate=3"], "unknown config key 'optim.lrate'; did you mean 'optim."),
    "unknown group": (["engine=zero4"], "no engine named 'zero4'; did you mean zero3? there are: zero2, zero3"),
    "missing values": (
        ["output_dir=???", "max_steps=???"],
        "missing: output_dir, max_steps; give output_dir=... max_steps=...",
    ),
    "wrong type": (["max_steps=lots"], "max_steps: input should be a valid integer"),
    "a group removed": (["~data"], "'data.cache_dir': groups of keys are not removed or replaced; set single keys"),
    "a space before the =": (["max_steps =3"], "'max_steps =3' has a space before the '='; write max_steps=3"),
    "a key within a text": (["+init_from.x=1"], "init_from: input should be a valid string"),
    "a name longer than a file's": (["+config=" + 5000 * "x"], "config cannot be read: [Errno 36] File name too long"),
    "contradiction": (["engine.stage=1"], "engine.offload_parameters=cpu needs engine.stage=3"),
    "two owners": (
        ["+engine.deepspeed.gradient_clipping=1"],
        "engine.deepspeed.gradient_clipping is set by optim.clip_norm; set it there",
    ),
    "batch that does not divide": (
        ["global_batch_size=30"],
        "global_batch_size 30 does not divide into micro_batch_size 4 x 1 rank; "
        "the nearest that does is global_batch_size=32",
    ),
    "missing data": (
        ["data.train={}/nowhere/*.jsonl"],
        "data.train: no file at '{}/nowhere/*.jsonl' (working directory: ",
    ),
    "missing held-out data": (["data.validation={}/gone"], "data.validation: no file at '{}/gone' "),
    "missing forgetting set": (["data.forgetting={}/gone"], "data.forgetting: no file at '{}/gone' "),
    "data of another kind": (
        ["data.train={}/not_a_model/readme"],
        "data.train: {}/not_a_model/readme is none of .jsonl",
    ),
    "no training data": (["data.train=null"], "data.train is null; give files to train on"),
    "no data": (["data.train=[]"], "data.train is empty; give files, folders or globs"),
    "empty data": (["data.train={}/empty.jsonl"], "{}/empty.jsonl: the data contain no text"),
    "blank data": (["data.train={}/blank.jsonl"], "{}/blank.jsonl: the data contain no text"),
    "broken record": (
        ["data.train={}/broken.jsonl"],
        "{}/broken.jsonl:21: not a line of JSON; each line must be one record (Expecting ',' delimiter",
    ),
    "record without text": (
        ["data.train={}/textless.jsonl"],
        "{}/textless.jsonl:21: no text in field 'text'; set data.text_field or correct the record",
    ),
    "lone surrogate": (["data.train={}/surrogate.jsonl"], "{}/surrogate.jsonl:1: a lone surrogate in the text"),
    "not UTF-8": (["data.train={}/latin.jsonl"], "{}/latin.jsonl:1: not UTF-8 text; convert it ("),
    "too many bad records": (
        ["data.train={}/broken.jsonl", "data.bad_records=skip"],
        "{}/broken.jsonl: 4.76% of the records are bad (1 x not a line of JSON), more than data.max_bad_share (1.00%)",
    ),
    "a column twice": (
        ["data.train={}/twice.parquet"],
        "{}/twice.parquet: cannot be read as parquet (it has the column",
    ),
    "a folder that may not be read": (
        ["data.train={}/closed"],
        "data.train: {}/closed cannot be read; correct its perm",
    ),
    "cut off": (["data.train={}/cut_off.jsonl.zst"], "{}/cut_off.jsonl.zst: cut off in the middle of a zstd frame"),
    "template without a place": (["data.chat_template=x"], "data.chat_template must contain {content} exactly once"),
    "weight of nothing": (["data.weights={a: 1}"], "data.train: nothing to pack of a; the components are train"),
    "no share": (["data.weights={train: 0}"], "data.weights must be above 0"),
    "kind without its fields": (["data.kind=chat"], "{}/train.jsonl:1: no messages; set data.messages_field"),
    "bad held-out record": (["data.validation={}/textless.jsonl"], "{}/textless.jsonl:21: no text in field 'text'"),
    "ids beyond the vocabulary": (
        ["model.vocab_size=270"],
        "but the model's vocab_size is 270; use the model's own tokenizer or raise model.vocab_size",
    ),
    "missing tokenizer": (["tokenizer={}/nowhere"], "tokenizer {}/nowhere: "),
    "folder without a tokenizer": (["tokenizer={}/weightless"], "tokenizer {}/weightless: "),
    "no tokenizer named": (["tokenizer=null"], "tokenizer is missing: give tokenizer=FOLDER, or init_from=FOLDER"),
    "missing init_from": (["init_from={}/nowhere"], "{}/nowhere/config.json: no readable GPT-J config.json here"),
    "init_from without config": (["init_from={}/not_a_model"], "{}/not_a_model/config.json: no readable GPT-J"),
    "init_from of another model": (["init_from={}/another_model"], "{}/another_model/config.json: model_type must be"),
    "wrong resume path": (
        ["resume={}/run/checkpoints/step_00000007"],
        "resume={}/run/checkpoints/step_00000007: no complete checkpoint there; give a checkpoints/step_... folder",
    ),
    "misspelt resume": (["resume=yes_please"], "resume=yes_please: no complete checkpoint there"),
    "incomplete checkpoint": (
        ["resume={}/run_cut_off/checkpoints/step_00000010"],
        "resume={}/run_cut_off/checkpoints/step_00000010: no complete checkpoint there",
    ),
    "none of the checkpoints complete": (
        ["output_dir={}/run_cut_off"],
        "none of the checkpoints can be used: {}/run_cut_off/checkpoints/step_00000010/manifest.json: cannot be read "
        "(No such file or directory); resume=never starts over",
    ),
    "sequence too long for the model": (
        ["sequence_length=257"],
        "sequence_length 257 exceeds the model's n_positions (256)",
    ),
    "sequence too long for init_from": (
        ["init_from={}/weightless", "sequence_length=65"],
        "sequence_length 65 exceeds the model's n_positions (64)",
    ),
    "sequence without a next token": (["sequence_length=1"], "sequence_length must be at least 2, got 1"),
    "stop file": (["output_dir={}/told_to_stop"], "{}/told_to_stop/STOP stops this run; remove it"),
    "a file as output_dir": (
        ["output_dir={}/train.jsonl"],
        "output_dir={}/train.jsonl: not a writable folder",
    ),
    "output_dir in a file": (
        ["output_dir={}/train.jsonl/x/y"],
        "output_dir={}/train.jsonl/x/y: not a writable folder",
    ),
    "output_dir in a pseudo file system": (["output_dir=/proc/self/mem/x"], "output_dir=/proc/self/mem/x: not a"),
    "no output_dir": (["output_dir=''"], "output_dir=: not a writable folder"),
    "overlong output_dir": (["output_dir=" + 5000 * "x"], "x: File name too long"),
    "a file as cache_dir": (["data.cache_dir={}/train.jsonl"], "data.cache_dir: cannot write into {}/train.jsonl ("),
    "cache_dir nowhere": (["data.cache_dir=/proc/x"], "data.cache_dir: cannot write into /proc/x ("),
    "data from a pipe": (["data.train={}/pipe.jsonl"], "{}/pipe.jsonl is not a regular file"),
    "data from a device": (["data.train={}/device.jsonl"], "{}/device.jsonl is not a regular file"),
    "data from a link to itself": (["data.train={}/loop.jsonl"], "{}/loop.jsonl is not a regular file"),
    "tokenizer from a pipe": (["tokenizer={}/pipe.jsonl"], "tokenizer {}/pipe.jsonl: pipe.jsonl is not a regular"),
    "checkpoint from a pipe": (["resume={}/pipe.jsonl"], "resume={}/pipe.jsonl: no complete checkpoint there"),
    "a class to build": (["+_target_=os.mkdir"], "unknown config key '_target_'"),
    "a class to build within": (["+model._target_=os.mkdir"], "unknown config key 'model._target_'"),
    "a preset of elsewhere": (["+config=../../../../tmp/x"], "no config/../../../../tmp named 'x'; there are: class"),
    "a group of elsewhere": (["engine=/etc/passwd"], "no engine//etc named 'passwd'; there are: zero2"),
    "an expression": (["output_dir=${eval:1}"], "config: Unsupported interpolation type eval"),
    "a variable that is not set": (["output_dir=${oc.env:SLURM_NOWHERE}"], "output_dir: ${oc.env:SLURM_NOWHERE} is no"),
    "a config that ends in itself": (["output_dir=${output_dir}"], "config: Recursive interpolation detected"),
    "a secret from the environment": (
        ["tracking.run_name=${oc.env:WANDB_API_KEY}"],
        "tracking.run_name: ${oc.env:WANDB_API_KEY} may be a secret, and the config is written to config.yaml and W",
    ),
    "a secret by a quoted name": (["tracking.run_name=${oc.env:'WANDB_API_KEY'}"], "${oc.env:WANDB_API_KEY} may be a"),
    "a variable with a harmless name": (["tracking.run_name=${oc.env:MY_SETTING}"], "${oc.env:MY_SETTING} may be a"),
    "the token of the Slurm job": (["tracking.run_name=${oc.env:SLURM_JWT}"], "${oc.env:SLURM_JWT} may be a secret"),
    "a secret that the shell put in": (
        ["tracking.run_name=run-0123456789"],
        "tracking.run_name contains the value of the environment variable WANDB_API_KEY",
    ),
    "a secret in a prompt": (
        ["sample_prompt=0123456789"],
        "sample_prompt contains the value of the environment variable WANDB_API_KEY",
    ),
    "a password in a URL": (["tokenizer=https://me:hunter2@host/x"], "tokenizer is a URL with a password"),
    "a secret among DeepSpeed's settings": (
        ["+engine.deepspeed.comet={api_key: abc}"],
        "engine.deepspeed.comet.api_key looks like a secret",
    ),
    "no hours": (["max_hours=0"], "max_hours must be above 0, or null for no limit, got 0"),
    "a negative timeout": (["hang_timeout=-1"], "hang_timeout must be 0 (never) or more, got -1"),
    "no time to come": (["rendezvous_timeout=0"], "rendezvous_timeout must be above 0 seconds, got 0"),
    "no step to be skipped": (["max_skipped_steps=0"], "max_skipped_steps must be at least 1, got 0"),
    "odd rotary_dim": (["model.rotary_dim=7"], "model.rotary_dim (7) must be even"),
    "no layers": (["model.n_layer=0"], "model.n_layer must be at least 1, got 0"),
}


@pytest.mark.parametrize(("changes", "cause"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(clm: Command, place: Path, changes: list[str], cause: str) -> None:
    code, message = clm(*changes)
    assert code == 2
    assert message.startswith("error: ")
    assert cause.replace("{}", str(place)) in message
    assert message.count("\n") == 1
    assert message.endswith("\n")
    assert not (place / "run").exists()


def test_a_signal_before_training_ends_the_run_at_once(clm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "Engine", lambda **_: os.kill(os.getpid(), signal.SIGUSR1))
    warned = "stopped: SIGUSR1 outside the training loop; rerun the same command\n"
    for _ in range(2):
        assert clm() == (85, warned)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # as in a new process
    # Without progress a job must not be queued again for ever.
    code, message = clm()
    assert (code, message.startswith(f"{warned}error: attempt 3 is the last of 3 in a row that saved no new")) == (
        2,
        True,
    )


def test_sigterm_before_training_is_not_a_preemption(clm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes to the others when one rank fails, and then that rank's exit code must decide."""
    monkeypatch.setattr(finetune, "Engine", lambda **_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(StopRequest, "has_trained", False)
    assert clm() == (143, "ended by SIGTERM outside the training loop, nothing was saved\n")


@pytest.mark.parametrize("tag", ["python/object/apply:os.mkdir [{}]", "python/name:os.mkdir", "python/module:os"])
def test_a_preset_is_data(
    place: Path, tag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """YAML tags that build Python objects are refused, by Hydra's own switches too."""
    presets, canary = place / "presets" / "config", place / "canary"
    presets.mkdir(parents=True)
    (presets / "evil.yaml").write_text(f"# @package _global_\nmax_steps: !!{tag.replace('{}', str(canary))}\n")
    for switch in ([], ["--cfg", "job"]):
        monkeypatch.setattr(sys, "argv", [str(RECIPE), "--config-dir", str(presets.parent), "+config=evil", *switch])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(RECIPE), run_name="__main__")
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (2, "")
        assert err.startswith("error: the command line or config cannot be read: could not determine a constructor")
        assert err.count("\n") == 1
        assert not canary.exists()


def run_outside(command: list[str], place: Path, *changes: str) -> subprocess.CompletedProcess[str]:
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in ranks} | {"DS_ACCELERATOR": "cpu"}
    command = [*command, str(RECIPE), *arguments(place, *changes)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=place, timeout=120)


def test_under_plain_python(place: Path) -> None:
    done = run_outside([sys.executable], place, "max_step=3")
    assert done.returncode == 2
    assert done.stderr == "error: unknown config key 'max_step'; did you mean 'max_steps'?\n"
    assert done.stdout == ""
    assert not (place / "run").exists()


@pytest.mark.distributed
def test_two_ranks_report_it_once(place: Path) -> None:
    """Missing weights show only when the ranks have connected and read them."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "-q", "--num_gpus", "2"]
    done = run_outside(launcher, place, "init_from={}/weightless")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {place}/weightless: no model.safetensors")
    assert done.stderr.count("\n") == 1
    assert json.loads((place / "run" / "status.json").read_text())["state"] == "failed"
    assert not (place / "run" / "checkpoints").exists()
