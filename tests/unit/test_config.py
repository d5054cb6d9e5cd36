"""From YAML and the command line to a frozen dataclass; all errors of a config are reported in one line."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptj_train.config import (
    ClassificationConfig,
    ClmConfig,
    FinetuneConfig,
    GenerateConfig,
    QAConfig,
    model_config_of,
)
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.launch.command_line import _quote_text, compose
from gptj_train.launch.ranks import set_rank_variables
from gptj_train.schema import keys_of, plain_text_keys, text_keys
from gptj_train.training.schedule import lr_at, warmup_of
from gptj_train.vocabulary import build_vocabulary

ROOT = Path(__file__).parents[2]
FILLED = ["output_dir=out", "init_from=null", "max_steps=7", "data.train=a.jsonl"]


def config(*overrides: str) -> ClmConfig:
    return compose("clm", [*FILLED, *overrides], ClmConfig)


def message_of(*overrides: str) -> str:
    with pytest.raises(UserError, match=r"\S") as caught:
        config(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_arrive_typed_and_frozen() -> None:
    made = config("optim.lr=2e-5", "optim.betas=[0.8,0.9]", "+engine.deepspeed.a.b=1", "data.train=[x,y]")
    assert made.max_steps == 7
    assert (made.optim.lr, made.optim.betas) == (2e-5, (0.8, 0.9))
    assert made.engine.deepspeed == {"a": {"b": 1}}
    assert made.data.train == ["x", "y"]
    assert made.init_from is None
    with pytest.raises(FrozenInstanceError):
        made.max_steps = 8  # type: ignore[misc]


def test_keys() -> None:
    keys = list(keys_of(ClmConfig))
    assert len(keys) == len(set(keys))
    assert {"max_steps", "optim", "optim.lr", "engine.deepspeed", "tracking.run_name"} <= set(keys)
    assert {"output_dir", "init_from", "data.text_field", "engine.nvme_path"} <= text_keys(ClmConfig)
    assert "data.train" in text_keys(ClmConfig)
    assert not {"max_steps", "optim.lr", "add_tokens", "engine.stage"} & text_keys(ClmConfig)
    assert plain_text_keys(ClmConfig) == {"sample_prompt"}
    assert plain_text_keys(GenerateConfig) == {"chat_template", "prompt"}


def test_all_unknown_keys_are_reported_with_the_nearest_name() -> None:
    assert message_of("+max_stepz=1", "+optim.warmup_step=1", "+lr=1", "+qqq=1", "+engine.stagee=1") == (
        "unknown config key 'engine.stagee'; did you mean 'engine.stage'?; "
        "unknown config key 'optim.warmup_step'; did you mean 'optim.warmup_steps'?; "
        "unknown config key 'max_stepz'; did you mean 'max_steps'?; "
        "unknown config key 'lr'; did you mean 'optim.lr'?; "
        "unknown config key 'qqq'; run with --help to see all keys"
    )


def test_deepspeed_settings_may_have_any_key() -> None:
    assert config("+engine.deepspeed.zero_optimization.anything=1").engine.deepspeed == {
        "zero_optimization": {"anything": 1}
    }


def test_all_missing_values_are_reported() -> None:
    missing = ["output_dir=???", "init_from=???", "max_steps=???", "data.train=???", "engine=zero3_nvme"]
    assert message_of(*missing) == (
        "missing: engine.nvme_path, output_dir, init_from, max_steps, data.train; "
        "give engine.nvme_path=... output_dir=... init_from=... max_steps=... data.train=..."
    )


def test_removed_keys_are_missing() -> None:
    assert message_of("~optim.lr", "~seed") == "seed is missing; optim.lr is missing"


def test_all_wrong_values_are_reported() -> None:
    message = message_of("max_steps=many", "optim.lr=high", "engine.stage=5", "optim.schedule=cosin", "resume=[5]")
    for part in (
        "max_steps: input should be a valid integer, unable to parse string as an integer, got 'many'",
        "optim.lr: input should be a valid number, unable to parse string as a number, got 'high'",
        "engine.stage: input should be 0, 1, 2 or 3, got 5",
        "optim.schedule: input should be 'cosine', 'linear', 'constant' or 'wsd', got 'cosin'",
        "resume: input should be a valid string, got [5]",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_steps=-1", "max_steps must be 0 or more, got -1"),
        ("max_steps=2.5", "max_steps: input should be a valid integer, got a number with a fractional part, got 2.5"),
        ("max_steps=null", "give either max_steps=... or epochs=..., and null to the other"),
        ("micro_batch_size=-1", "micro_batch_size must be at least 1, got -1"),
        ("keep_checkpoints=0", "keep_checkpoints must be at least 1, got 0"),
        ("eval_every=-1", "eval_every must be 0 (only at the end) or more, got -1"),
        ("epochs=3", "max_steps=7 and epochs=3 are both given; give one of them, and null to the other"),
        ("patience=0", "patience must be at least 1, or null for no limit, got 0"),
        ("best_metric=loss", "best_metric=loss: choose one of eval_loss, perplexity, "),
        ("optim.warmup_ratio=1", "optim: warmup_ratio must be at least 0 and below 1, got 1.0"),
        (
            "optim.warmup_steps=7",
            "optim.warmup_steps=7: a warm-up of 7 steps is not shorter than the run of 7 steps, which would end at its "
            "highest learning rate; lower optim.warmup_steps",
        ),
        ("optim.lr=0", "optim: lr must be above 0, got 0.0"),
        ("optim.betas=[0.9]", "optim.betas.1 is missing"),
        ("engine.stage=2", "engine.offload_parameters=cpu needs engine.stage=3"),
        ("export_dtype=int8", "export_dtype: input should be 'bf16', 'fp16' or 'fp32', got 'int8'"),
        ("model.n_layer=few", "model.n_layer: input should be a valid integer"),
        ("max_steps=true", "max_steps must be a number, got true"),
        ("optim.eps=false", "optim.eps must be a number, got false"),
        ("optim.betas=[0.9,true]", "optim.betas must be a number, got true"),
        ("engine.stage=true", "engine.stage must be a number, got true"),
        ("lora.rank=true", "lora.rank must be a number, got true"),
        ("max_hours=true", "max_hours must be a number, got true"),
        ("data.weights={a: true}", "data.weights must be a number, got true"),
        ("max_steps=1e12", "max_steps must be at most 2147483647, got 1000000000000.0"),
        ("max_steps=100000000", "max_steps must be at most 99999999, got 100000000"),
        ("seed=18446744073709551616", "seed must be at most 9007199254740992, got 18446744073709551616"),
        ("global_batch_size=10000001", "global_batch_size must be at most 10000000, got 10000001"),
        ("hang_timeout=1e9", "hang_timeout must be at most 10000000, got 1000000000.0"),
        ("optim.lr=1e39", "optim.lr must be at most 3.4e+38, got 1e+39"),
        ("optim.lr=inf", "optim.lr must be at most 3.4e+38, got inf"),
        ("optim.lr=nan", "optim.lr: input should be a finite number"),
        ("optim.eps=0", "optim: eps must be above 0 (at least 1e-37), got 0.0"),
        ("optim.eps=1e-45", "optim: eps must be above 0 (at least 1e-37), got 1e-45"),
        ("optim.eps=-1e-8", "optim: eps must be above 0 (at least 1e-37), got -1e-08"),
        ("optim.betas=[0.9,1]", "optim: betas must be in [0, 1), got (0.9, 1.0)"),
        ("optim.betas=[0.9,0.999999999]", "optim: betas must be in [0, 1), got (0.9, 0.999999999)"),
        ("optim.betas=[-0.1,0.9]", "optim: betas must be in [0, 1), got (-0.1, 0.9)"),
        ("lora.alpha=0", "lora.alpha must be above 0, got 0"),
        ("optim=null", "optim"),
        ("data.cache_dir=${nowhere}", "config: Interpolation key 'nowhere' not found"),
        (
            "+engine.deepspeed.train_batch_size=8",
            "engine.deepspeed.train_batch_size is set by global_batch_size; set it there",
        ),
    ],
)
def test_invalid_values(override: str, message: str) -> None:
    if override == "optim=null":  # Hydra itself refuses to choose no group
        assert "give one of its choices, " in message_of(override)
    else:
        assert message_of(override).startswith(message)


def with_preset(folder: Path, preset: str, *overrides: str) -> ClmConfig:
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / "mine.yaml").write_text(f"# @package _global_\n{preset}")
    filled = [override for override in FILLED if not override.startswith("max_steps")]
    return compose("clm", ["--config-dir", str(folder), "+config=mine", *filled, *overrides], ClmConfig)


@pytest.mark.parametrize(
    ("preset", "override", "steps", "epochs"),
    [
        ("max_steps: 9\n", "seed=1", 9, None),
        ("max_steps: 9\n", "epochs=3", None, 3.0),
        ("epochs: 3\n", "seed=1", None, 3.0),
        ("epochs: 3\n", "max_steps=9", 9, None),
        ("epochs: 3\n", "epochs=0.5", None, 0.5),
        ("max_steps: null\nepochs: 3\n", "seed=1", None, 3.0),
    ],
)
def test_the_command_line_replaces_steps_by_epochs_and_epochs_by_steps(
    tmp_path: Path, preset: str, override: str, steps: int | None, epochs: float | None
) -> None:
    made = with_preset(tmp_path, preset, override)
    assert (made.max_steps, made.epochs) == (steps, epochs)


def test_two_lengths_in_presets_or_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_steps=9 and epochs=3 are both set by presets; give one of them"):
        with_preset(tmp_path, "max_steps: 9\nepochs: 3\n")
    with pytest.raises(UserError, match=r"missing: max_steps; give max_steps=\.\.\."):
        with_preset(tmp_path, "seed: 1\n")
    with pytest.raises(UserError, match=r"epochs must be above 0, got 0\.0"):
        with_preset(tmp_path, "epochs: 0\n")


def test_a_warm_up_ratio_replaces_the_steps_of_a_preset(tmp_path: Path) -> None:
    preset = "max_steps: 100\noptim: {warmup_steps: 9}\n"
    assert with_preset(tmp_path, preset).optim.warmup_steps == 9
    made = with_preset(tmp_path, preset, "optim.warmup_ratio=0.2").optim
    assert (made.warmup_steps, made.warmup_ratio) == (None, 0.2)
    with pytest.raises(UserError, match=r"optim\.warmup_ratio and optim\.warmup_steps are both given"):
        with_preset(tmp_path, preset, "optim.warmup_ratio=0.2", "optim.warmup_steps=3")


@pytest.mark.parametrize(
    ("recipe", "cls", "preset", "warmup"),
    [
        ("clm", ClmConfig, "quickstart", 20),
        ("clm", ClmConfig, "gptj_6b_zero3", 50),
        ("clm", ClmConfig, "gptj_6b_zero3_offload", 50),
        ("clm", ClmConfig, "gptj_6b_lora", 50),
        ("classification", ClassificationConfig, "gptj_6b_classification", 50),
        ("classification", ClassificationConfig, "classification_quickstart", 20),
        ("qa", QAConfig, "gptj_6b_qa", 400),
        ("qa", QAConfig, "qa_quickstart", 40),
    ],
)
def test_presets_have_the_warm_up_that_they_were_tried_with(
    recipe: str, cls: type[FinetuneConfig], preset: str, warmup: int
) -> None:
    made = compose(recipe, [f"+config={preset}", "init_from=null", "data.train=a"], cls)
    assert warmup_of(made.optim, made.steps) == warmup
    short = compose(recipe, [f"+config={preset}", "init_from=null", "data.train=a", "max_steps=20"], cls)
    # Near the peak in the beginning, near a tenth of it at the end.
    rates = [lr_at(step, 20, short.optim) / short.optim.lr for step in range(20)]
    assert max(rates[:4]) > 0.9
    assert rates[-1] == pytest.approx(0.1)


def test_model_config() -> None:
    tiny = config("model=gptj_tiny", "model.n_inner=99", "model.resid_pdrop=0.5").model
    built = model_config_of(tiny, None)
    assert (built.n_embd, built.n_layer, built.inner_size, built.vocab_size) == (256, 4, 99, 2048)
    with pytest.raises(UserError, match=r"nowhere/config\.json: no readable GPT-J config\.json"):
        model_config_of(tiny, "nowhere")


def test_init_from_gives_the_shape_and_the_config_the_dropout(tmp_path: Path) -> None:
    model_config_of(config("model=gptj_tiny", "model.attn_pdrop=0.25").model, None).save_pretrained(tmp_path)
    built = model_config_of(config("model.resid_pdrop=0.5").model, str(tmp_path))
    assert (built.n_embd, built.n_layer, built.vocab_size) == (256, 4, 2048)
    # A dropout of 0 is the preset's default and leaves the folder's own value.
    assert (built.resid_pdrop, built.embd_pdrop, built.attn_pdrop) == (0.5, 0.0, 0.25)


def test_vocabulary(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    tiny = ["model=gptj_tiny", f"tokenizer={tmp_path}", "sequence_length=256"]
    loaded, model_config, mean_rows = build_vocabulary(config(*tiny, "add_tokens=['<new> = the fox']"))
    assert (model_config.bos_token_id, model_config.eos_token_id, model_config.vocab_size) == (0, 0, 2048)
    assert loaded.encode("<new>") == [len(tokenizer)]
    assert mean_rows == {len(tokenizer): [*tokenizer.encode("the"), *tokenizer.encode("fox")]}
    with pytest.raises(UserError, match=r"sequence_length 257 exceeds the model's n_positions \(256\)"):
        build_vocabulary(config(*tiny, "sequence_length=257"))
    with pytest.raises(UserError, match="ids up to 339, but the model's vocab_size is 300"):
        build_vocabulary(config(*tiny, "model.vocab_size=300"))


JOB = """
from gptj_train.config import ClmConfig
from gptj_train.launch.ranks import rank, world_size
from gptj_train.launch.recipe import recipe

@recipe(ClmConfig, primary="clm")
def main(cfg):
    print(repr([cfg.max_steps, cfg.sample_prompt, cfg.optim.lr, rank(), world_size()]))

if __name__ == "__main__":
    main()
"""
PRESETS = {
    "good": "max_steps: 5\noutput_dir: out\ninit_from: null\ndata:\n  train: a\noptim:\n  lr: 0.5\n",
    "typo": "max_stepz: 5\noptim:\n  warmup: 3\n",
    "typo_in_a_group": "defaults:\n  - override /modell: gptj_tiny\n",
    "typo_in_a_choice": "defaults:\n  - override /model: gptj_tinny\n",
    "broken": "max_steps: [5,\n",
    "a_list": "- 1\n",
    "a_group_is_a_number": "max_steps: 5\noutput_dir: out\ninit_from: null\ndata:\n  train: a\noptim: 3\n",
}
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A recipe outside of the repository, beside a folder of the user's own presets."""
    (tmp_path / "presets" / "config").mkdir(parents=True)
    for name, text in PRESETS.items():
        (tmp_path / "presets" / "config" / f"{name}.yaml").write_text(f"# @package _global_\n{text}")
    (tmp_path / "job.py").write_text(JOB)
    return tmp_path / "job.py"


def presets(job: Path) -> list[str]:
    return ["--config-dir", str(job.parent / "presets")]


@pytest.fixture
def command(job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the recipe with a command line; returns exit code, stdout and stderr."""
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**environment, "HYDRA_FULL_ERROR": "0"}.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(job), *presets(job), *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(job), run_name="__main__")
        return (caught.value.code or 0, *capsys.readouterr())  # type: ignore[return-value]

    return run


def test_command_line_wins_over_preset_wins_over_primary(command: Command) -> None:
    assert command("+config=good") == (0, "[5, None, 0.5, 0, 1]\n", "")
    assert command("+config=good", "max_steps=6", "optim.lr=1e-3") == (0, "[6, None, 0.001, 0, 1]\n", "")


@pytest.mark.parametrize("prompt", ["def f(x):", "a, b", "{}[]", "it's", 'say "hi"', "1", "a=b", "ends with \\", "$x"])
def test_free_text_needs_no_quotes(command: Command, prompt: str) -> None:
    assert command("+config=good", f"sample_prompt={prompt}") == (0, f"{[5, prompt, 0.5, 0, 1]!r}\n", "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["+config=typo"], "unknown config key 'optim.warmup'"),
        (
            ["+config=typo_in_a_group"],
            "the command line or config cannot be read: In 'config/typo_in_a_group': Could not override 'modell'",
        ),
        (["+config=typo_in_a_choice"], "no model named 'gptj_tinny'; there are: gptj_6b, gptj_tiny"),
        (["+config=broken"], "the command line or config cannot be read: while parsing a flow node"),
        (["+config=a_list"], "the command line or config cannot be read: In 'config/a_list'"),
        (["+config=a_group_is_a_number"], "optim: input should be a dictionary"),
        (
            ["+config=quikstart"],
            "no config named 'quikstart'; did you mean quickstart? there are: a_group_is_a_number, ",
        ),
        (["+config=good", "max_step=3"], "unknown config key 'max_step'; did you mean 'max_steps'?"),
        (["+config=good", "optim.lrr=3"], "unknown config key 'optim.lrr'; did you mean 'optim.lr'?"),
        (["+config=good", "engine=zero9"], "no engine named 'zero9'; did you mean zero3? there are: zero2, zero3, "),
        (
            ["+config=good", "engine=null"],
            "engine=null: give one of its choices, zero2, zero3, ",
        ),
        (
            ["+config=good", "engine.deepspeed.x=1"],
            "'engine.deepspeed.x' is not there yet; add it with +engine.deepspeed.x=...",
        ),
        (
            ["+config=good", "engine.deepspeed={x: 1}"],
            "'engine.deepspeed.x' is not there yet; add it with +engine.deepspeed.x",
        ),
        (["+config=good", "max_steps"], "max_steps has no value; write max_steps=..."),
        (["+config=good", "optim.betas=[1,"], "'optim.betas=[1,' cannot be read; quote the value"),
        (
            ["+config=good", "max_steps=1,2"],
            "max_steps=1,2: several values; for a list write 'max_steps=[1,2]', for a sweep add --multirun",
        ),
        (["--cfg", "job", "+config=quikstart"], "no config named 'quikstart'"),
        (["--cfg", "job", "+config=good", "max_step=3"], "unknown config key 'max_step'; did you mean 'max_steps'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command: Command, arguments: list[str], line: str) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1


def test_the_broken_line_of_a_preset_is_named(command: Command) -> None:
    assert 'presets/config/broken.yaml", line 3' in command("+config=broken")[2]


def test_cfg_job_shows_the_composed_config(command: Command) -> None:
    code, out, _ = command("--cfg", "job", "+config=good")
    assert code == 0
    assert "max_steps: 5\n" in out
    assert "  lr: 0.5\n" in out


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("prompt", '"Hello," she said'),
        ("prompt", "'tis the season"),
        ("prompt", "for f in ${files}; do"),
        ("prompt", "{a: 1}, [b]"),
        ("prompt", "a \\ b\\"),
        ("checkpoint", "/models/my (new) one"),
    ],
)
def test_text_is_taken_literally(key: str, text: str) -> None:
    given = [f"{key}={text}"] if key == "checkpoint" else ["checkpoint=x", f"{key}={text}"]
    assert getattr(compose("generate", given, GenerateConfig), key) == text


@pytest.mark.parametrize("value", ["'quoted'", '"quoted"', "[a,b]", "${other}", "null", ""])
def test_values_in_hydras_syntax_stay_unchanged(value: str) -> None:
    assert _quote_text(f"data.train={value}", ClmConfig) == f"data.train={value}"


def test_no_such_config_dir(command: Command) -> None:
    code, _, err = command("--config-dir", "nowhere", "+config=good")
    assert code == 2
    assert err == "error: --config-dir nowhere: no such folder; give the folder that holds config/NAME.yaml\n"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_a_copy_under_another_name_keeps_its_config(
    recipe: Path, command: Command, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own recipe begins as a copy of one of ours, anywhere on disk."""
    monkeypatch.chdir(job.parent)
    shutil.copy(recipe, job)
    code, out, err = command("--cfg", "job")
    assert (code, err) == (0, "")
    shown = yaml.safe_load(out)
    original = yaml.safe_load((ROOT / "configs" / f"{recipe.stem}.yaml").read_text())
    assert {key for key in original if key != "defaults"} <= shown.keys()


def test_a_slurm_batch_script_is_one_rank(job: Path) -> None:
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    known = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    options: dict[str, Any] = {"env": known | slurm, "capture_output": True, "text": True, "check": False}
    done = subprocess.run([sys.executable, str(job), *presets(job), "+config=good"], **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[5, None, 0.5, 0, 1]\n", "")


def test_a_slurm_task_that_sees_one_gpu_uses_number_0(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    task = {"PROCID": "6", "LOCALID": "2", "STEP_NUM_TASKS": "8", "STEP_TASKS_PER_NODE": "4(x2)"}
    for name, value in task.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    set_rank_variables()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert [os.environ[name] for name in names] == ["6", "8", "0", "4"]


def test_ranks_and_the_launchers_argument(job: Path) -> None:
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
    known = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    options: dict[str, Any] = {"env": known | slurm, "capture_output": True, "text": True, "check": False}
    done = subprocess.run([sys.executable, str(job), "--local_rank=1", *presets(job), "+config=good"], **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[5, None, 0.5, 1, 4]\n", "")
