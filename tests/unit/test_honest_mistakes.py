"""What a newcomer types by mistake, the line that answers it, and exit code 2."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptj_train import GPTJConfig, GPTJForCausalLM, GPTJForSequenceClassification, finetune
from gptj_train.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {number} of a few" for number in range(40)]
SHAPE = {"vocab_size": 512, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}


class StartedError(Exception):
    """The recipe accepted the request and would train."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, two tokenizers, an exported model, a run folder and a classifier."""
    folder = tmp_path_factory.mktemp("place")
    own = Tokenizer.train(TEXTS, 300)
    own.save(folder / "tokenizer")
    Tokenizer.train(["quite another text about other things, things, text"], 300).save(folder / "other_tokenizer")
    torch.manual_seed(0)
    for path in (folder / "model", folder / "a_run" / "export"):
        path.mkdir(parents=True)
        GPTJForCausalLM(GPTJConfig(**SHAPE)).save_pretrained(path)
        own.save(path)
    (folder / "classifier").mkdir()
    GPTJForSequenceClassification(GPTJConfig(**SHAPE)).save_pretrained(folder / "classifier")
    own.save(folder / "classifier")
    records = {
        "text.jsonl": [{"text": text} for text in TEXTS],
        "chat.jsonl": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        "pairs.jsonl": [{"prompt": "a", "response": "b"}],
        "lists.jsonl": [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": ["x"]}],
        "labels.jsonl": [{"text": text, "label": "yn"[number % 2]} for number, text in enumerate(TEXTS)],
    }
    for name, lines in records.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def command(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run a recipe in this process up to its engine; {} is the folder. Returns exit code and stderr."""

    def started(**_: object) -> None:
        raise StartedError

    monkeypatch.setattr(finetune, "Engine", started)
    monkeypatch.chdir(tmp_path)
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def run(recipe: str, *arguments: str) -> tuple[int, str]:
        path = str(ROOT / "recipes" / f"{recipe}.py")
        monkeypatch.setattr(sys, "argv", [path, *[argument.replace("{}", str(place)) for argument in arguments]])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(path, run_name="__main__")
        return int(caught.value.code or 0), capsys.readouterr().err.replace(str(place), "{}")

    return run


SMALL = (
    *("+config=quickstart", "output_dir=run", "tokenizer={}/tokenizer", "data.train={}/text.jsonl", "max_steps=1"),
    *("data.validation=null", "data.cache_dir=cache", "model.vocab_size=512", "sequence_length=64"),
)
START = ("+config=quickstart", "output_dir=run", "init_from={}/model", "data.train={}/text.jsonl", "max_steps=1")
LABELLED = ("+config=classification_quickstart", "output_dir=run", "data.validation=null", "tokenizer={}/tokenizer")

MISTAKES = [
    # --- spelling of the command line ---
    ("clm config=quickstart", "presets are added with a plus; write +config=quickstart"),
    ("clm quickstart", "quickstart is a preset; write +config=quickstart"),
    ("clm --config quickstart", "settings have no dashes; write +config=quickstart"),
    ("clm --config-name quickstart", "a recipe has one primary config; give a preset with +config=NAME"),
    ("clm --max_steps 10", "settings have no dashes; write max_steps=10"),
    ("clm --max-steps=10", "settings have no dashes; write max_steps=10"),
    ("generate --checkpoint X", "settings have no dashes; write checkpoint=X"),
    ("clm --learning_rate 1e-4", "unknown config key 'learning_rate'; here it is optim.lr"),
    ("clm max_steps 10", "max_steps has no value; write max_steps=10"),
    ("clm +config quickstart", "a preset is given as +config=quickstart"),
    ("clm preset=quickstart", "a preset is given as +config=quickstart"),
    ("clm max_steps = 10", "write max_steps=VALUE, without spaces around the ="),
    ("clm max_steps: 10", "max_steps has no value; write max_steps=10"),
    ("clm data.train=[a.txt b.txt]", "separate the elements of a list by commas, and quote it, 'data.train=[a.txt, b."),
    ("clm lora=true", "lora=true: give one of its choices, adapters, none"),
    ("clm optim.lr=1e-4,2e-4", "several values; for a list write 'optim.lr=[1e-4,2e-4]', for a sweep add --multirun"),
    ("clm some words", "'some' is no setting; write key=value, and see the keys with --help"),
    ("generate checkpoint=x prompt=Hello, world", "quote a value with spaces, 'prompt=Hello, world'"),
    ("clm +config=quikstart", "no config named 'quikstart'; did you mean quickstart? there are: classification_"),
    ("clm +config=gptj_6b_classification", "is a preset of recipes/classification.py; choose one of gptj_6b_1x141gb"),
    ("classification +config=gptj_6b_qa", "is a preset of recipes/qa.py; choose one of classification_quickstart"),
    ("qa +config=quickstart", "is a preset of recipes/clm.py; choose one of gptj_6b_1x141gb"),
    ("clm model=EleutherAI/gpt-j-6B", "there are: gptj_6b, gptj_tiny. These are shapes; weights are init_from=..."),
    # --- names of other trainers ---
    ("clm lr=1e-4", "did you mean 'optim.lr'?"),
    ("clm learning_rate=1e-4", "here it is optim.lr"),
    ("clm batch_size=4", "here it is global_batch_size (samples of a step over all ranks) or micro_batch_size (of a"),
    ("clm per_device_train_batch_size=4", "here it is micro_batch_size"),
    ("clm gradient_accumulation_steps=4", "it follows from global_batch_size, micro_batch_size and the number of"),
    ("clm warmup_steps=10", "did you mean 'optim.warmup_steps'?"),
    ("clm save_steps=10", "here it is save_every"),
    ("clm max_seq_length=10", "here it is sequence_length"),
    ("clm model_name_or_path=x", "here it is init_from"),
    ("clm train_file=x", "here it is data.train"),
    ("clm bf16=true", "here it is engine.precision"),
    ("clm base_model=x", "here it is init_from"),
    ("clm sequence_len=9", "here it is sequence_length"),
    ("clm cutoff_len=9", "here it is sequence_length"),
    ("clm val_set_size=0.1", "here it is validation_share"),
    ("clm max_iters=9", "here it is max_steps"),
    ("clm warmup_iters=9", "here it is optim.warmup_steps"),
    ("clm eval_interval=9", "here it is eval_every"),
    ("clm lora_target_modules=x", "here it is lora.targets"),
    ("clm adapter=lora", "here it is lora"),
    ("clm sample_packing=true", "here it is data.packing"),
    ("clm dataset_text_field=x", "here it is data.text_field"),
    ("clm overwrite_output_dir=true", "resume=never starts over in a folder that holds a run"),
    ("clm train_on_inputs=true", "data.kind=completion or chat learns only the response, data.kind=text everything"),
    ("clm num_gpus=2", "it belongs to the launcher: deepspeed -q --num_gpus N recipes/..."),
    ("clm trust_remote_code=true", "no code from a checkpoint runs here"),
    ("generate model_name_or_path=x", "here it is checkpoint"),
    ("generate model=x", "here it is checkpoint"),
    ("evaluate checkpoint={}/model data.test=x", "here it is data.validation"),
    ("evaluate checkpoint={}/model data=x.jsonl", "data=x.jsonl: files are data.train=FILES and data.validation=FILES"),
    ("export checkpoint=x", "here it is run"),
    ("import_mesh checkpoint=x", "here it is source"),
    ("generate max_tokens=9", "here it is max_new_tokens"),
    # --- missing or misread values ---
    ("evaluate checkpoint={}/model", "missing: data.validation; give data.validation=..."),
    ("clm", "missing: output_dir, init_from, max_steps, data.train; give"),
    ("generate checkpoint=x stop=a,b", "'stop=a,b' may be a list, stop=[a,b], or a text with a comma, 'stop=\"a,b\"'"),
    ("generate checkpoint={}/model prompt=a max_new_tokens=8 temperature=0", "temperature"),
    # --- models and tokenizers ---
    ("generate checkpoint={}/a_run prompt=a", "this is a run folder, use {}/a_run/export"),
    ("generate checkpoint={}/nowhere prompt=a", "config.json here (No such file or directory); give the folder of a"),
    (
        "generate checkpoint={}/model prompt=a",
        "exceed the model's n_positions (64); shorten the prompt, or lower max_new",
    ),
    ((*START, "init_from={}/a_run"), "this is a run folder, use {}/a_run/export"),
    ((*SMALL, "tokenizer=gpt2"), "tokenizer gpt2: no such file or folder here; give a tokenizer.json"),
    ("generate checkpoint={}/classifier prompt=a", "is a GPTJForSequenceClassification, which writes no text"),
    ("generate checkpoint={}/model prompt=a chat=true", "has no chat template; give that of its training"),
    ((*SMALL, "sequence_length=1024"), "n_positions (256); set sequence_length=256 or less or raise model.n_positions"),
    ((*START, "sequence_length=32", "tokenizer={}/other_tokenizer"), "gives other ids than the tokenizer of init_from"),
    ((*START, "sequence_length=32", "model.n_layer=2"), "model.n_layer=2 contradicts init_from={}/model, which has 1"),
    ((*START, "sequence_length=32", "model=gptj_6b"), "contradicts init_from={}/model"),
    # --- data ---
    ((*SMALL, "data.train={}/texx.jsonl"), "; did you mean '{}/text.jsonl'?"),
    ((*SMALL, "data.train=imdb"), "for a dataset of the Hugging Face hub write data.dataset=imdb"),
    ((*SMALL, "data.train={}/tokenizer/nothing"), "data.train: no file at '{}/tokenizer/nothing'"),
    ((*SMALL, "data.train={}/classifier/model.safetensors"), "model.safetensors is none of .jsonl"),
    ((*SMALL, "data.validation={}/text.jsonl", "validation_share=0.1"), "both say what is held out; give one of them"),
    ((*SMALL, "validation_share=10"), "validation_share must be above 0 and below 1, such as 0.02"),
    ((*SMALL, "data.train={}/text.jsonl", "data.weights={x: 1}"), "nothing to pack of x; the components are text"),
    (
        ("classification", *LABELLED, "data.train={}/lists.jsonl"),
        "task=multi_label learns several labels for each text",
    ),
    (("classification", *LABELLED, "data.train={}/labels.jsonl", "data.label_field=class"), "no 'class'"),
]


@pytest.mark.parametrize(("words", "line"), MISTAKES, ids=[line[:50] for _, line in MISTAKES])
def test_a_mistake_is_answered_in_one_line(
    command: Callable[..., tuple[int, str]], tmp_path: Path, words: str | tuple[str, ...], line: str
) -> None:
    arguments = words.split() if isinstance(words, str) else list(words)
    if "=" in arguments[0]:
        arguments.insert(0, "clm")
    if line.startswith("quote a value"):
        arguments = ["generate", "checkpoint=x", "prompt=Hello,", "world"]
    code, said = command(*arguments)
    assert code == 2
    assert said.startswith("error: ")
    assert line in said
    assert said.count("\n") == 1
    assert len(said) < 400
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    ["data.cache_dir=cache", "tokenizer={}/tokenizer", "tokenizer_mismatch=allow tokenizer={}/other_tokenizer"],
)
def test_the_initial_model_keeps_its_own_tokenizer(command: Callable[..., tuple[int, str]], change: str) -> None:
    """The preset's tokenizer does not exist here, and gives way; its own may be named; another must be allowed."""
    arguments = [*START, "sequence_length=32", "data.validation=null", "data.cache_dir=cache", *change.split()]
    with pytest.raises(StartedError):
        command("clm", *arguments)


@pytest.mark.usefixtures("command")
def test_help_lists_a_recipes_own_keys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    class_keys = {"clm": ("sample_prompt", "task.doc_stride"), "qa": ("task.doc_stride", "sample_prompt")}
    for recipe, (own, foreign) in class_keys.items():
        path = str(ROOT / "recipes" / f"{recipe}.py")
        monkeypatch.setattr(sys, "argv", [path, "--help", "max_steps=7"])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(path, run_name="__main__")
        text = capsys.readouterr().out
        assert caught.value.code == 0
        assert f"  {own}=" in text
        assert f"  {foreign}=" not in text
        assert "  max_steps=7 " in text
        assert "optimizer steps; 0: evaluate and export the initial weights" in text
