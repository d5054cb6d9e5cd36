"""Arguments, outputs and folders behave as Transformers users expect; what is not offered is refused by name."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import edit_json, read_json, write_folder
from pair import SMALL, assert_close, build_pair, build_reference, random_ids
from torch.utils import _pytree as pytree

from gptj_train import GPTJConfig, GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification
from gptj_train.model.outputs import CausalLMOutput


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(build_reference(), tmp_path / "theirs", "safetensors")


# --- config ---


def test_config_takes_every_name() -> None:
    config = GPTJConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=3, rotary_dim=4, num_labels=3)  # type: ignore[call-arg]
    assert (config.n_embd, config.n_head, config.n_layer) == (32, 4, 3)
    assert config.id2label == transformers.GPTJConfig(num_labels=3).id2label
    config.num_hidden_layers = 5
    assert config.n_layer == config.num_hidden_layers == 5
    assert GPTJConfig().id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert GPTJConfig(dtype=torch.bfloat16).dtype == "bfloat16"  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_labels_agree_whatever_is_set(tmp_path: Path) -> None:
    ours, theirs = GPTJConfig(**SMALL), transformers.GPTJConfig(**SMALL)
    for config in (ours, theirs):
        config.num_labels = 4
    assert ours.id2label == theirs.id2label
    assert ours.label2id == theirs.label2id
    ours.save_pretrained(tmp_path)
    assert transformers.GPTJConfig.from_pretrained(tmp_path).num_labels == 4
    ours.id2label = {"0": "no", "1": "yes"}  # type: ignore[dict-item]
    assert (ours.num_labels, ours.label2id) == (2, {"no": 0, "yes": 1})
    assert GPTJConfig(label2id={"b": 1, "a": 0, "c": 2}).id2label == {0: "a", 1: "b", 2: "c"}  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hiden_size": 8}, "no 'hiden_size'; did you mean 'hidden_size'?"),
        ({"num_label": 3}, "did you mean 'num_labels'?"),
        ({"n_embd": 32, "hidden_size": 64}, "contradicts"),
        ({"id2label": {0: "a"}, "label2id": {"b": 0}}, "must be the inverse"),
        ({"num_labels": 0}, "num_labels"),
    ],
)
def test_config_refuses(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        GPTJConfig(**given)


def test_written_folders_are_read_by_transformers(tmp_path: Path) -> None:
    odd = SMALL | {"rotary_dim": None, "layer_norm_epsilon": 0, "initializer_range": 0}
    GPTJConfig(**odd).save_pretrained(tmp_path)
    theirs = transformers.GPTJConfig.from_pretrained(tmp_path)
    assert theirs.rotary_dim == 8
    assert isinstance(theirs.layer_norm_epsilon, float)
    with pytest.raises(ValueError, match="a span has 2 labels"):
        GPTJForQuestionAnswering(GPTJConfig(**SMALL, num_labels=3))


# --- from_pretrained ---


def test_fields_replace_those_of_the_folder(folder: Path) -> None:
    model = GPTJForCausalLM.from_pretrained(folder, use_cache=False, attn_pdrop=0.25, output_hidden_states=True)
    assert (model.config.use_cache, model.config.attn_pdrop) == (False, 0.25)
    assert model.name_or_path == str(folder)
    config = GPTJConfig.from_pretrained(folder, resid_pdrop=0.5)
    assert GPTJForCausalLM.from_pretrained(folder, config=config).config.resid_pdrop == 0.5
    theirs = transformers.GPTJConfig.from_pretrained(folder)
    assert GPTJForCausalLM.from_pretrained(folder, config=theirs, attn_pdrop=0.125).config.attn_pdrop == 0.125


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(("value", "expected"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_dtype_by_either_name(folder: Path, name: str, value: str, expected: torch.dtype) -> None:
    assert GPTJForCausalLM.from_pretrained(folder, **{name: value}).dtype == expected


def test_options_without_effect_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    GPTJForCausalLM.from_pretrained(
        folder, revision="main", local_files_only=True, trust_remote_code=False, device_map="cpu", variant=None
    )
    assert "without effect on a local folder: revision, local_files_only" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_remote_code": True}, "no code from a folder ever runs"),
        ({"load_in_8bit": True}, "does not offer load_in_8bit=True"),
        ({"device_map": "auto"}, "accelerate.dispatch_model"),
        ({"dtype": "int8"}, "float dtype"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "contradicts"),
        ({"num_lables": 3}, "did you mean 'num_labels'"),
        ({"trust_remote_cod": True}, "did you mean 'trust_remote_code'"),
    ],
)
def test_from_pretrained_refuses(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTJForCausalLM.from_pretrained(folder, **options)


def test_another_number_of_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    ours, _ = build_pair("GPTJForSequenceClassification", num_labels=3)
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"score\.weight has shape"):
        GPTJForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model = GPTJForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert "new head" in caplog.text
    assert (model.score.weight.shape[0], len(model.config.id2label)) == (5, 5)
    assert torch.equal(model.transformer.wte.weight, ours.transformer.wte.weight)
    kept = GPTJForSequenceClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert torch.equal(kept.score.weight, ours.score.weight)


def test_differing_head_of_a_tied_config_is_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)
    ours = GPTJForCausalLM.from_pretrained(folder)
    theirs = transformers.GPTJForCausalLM.from_pretrained(folder).eval()
    assert "they stay two, untied" in caplog.text
    ids = random_ids()
    assert_close(ours(ids).logits, theirs(ids).logits)
    assert not ours.config.tie_word_embeddings


# --- save_pretrained ---


def test_each_tensor_keeps_its_dtype(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = build_pair()
    model.bfloat16()
    model.transformer.ln_f.float().weight.data.fill_(1.001)
    model.save_pretrained(tmp_path)
    stored = transformers.GPTJForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(stored.transformer.ln_f.weight, torch.full((32,), 1.001))
    ours = GPTJForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    assert "the folder mixes dtypes" in caplog.text
    assert ours(random_ids()).logits.isfinite().all()
    wide = GPTJForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert_close(wide.transformer.ln_f.weight, torch.full((32,), 1.001))


def test_saving_options(tmp_path: Path) -> None:
    model, reference = build_pair()
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB", safe_serialization=True)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "doubled", state_dict=doubled)
    again = transformers.GPTJForCausalLM.from_pretrained(tmp_path / "doubled")
    assert_close(again.lm_head.weight, 2 * reference.lm_head.weight)
    with pytest.raises(ValueError, match="safetensors into a local folder"):
        model.save_pretrained(tmp_path / "m", push_to_hub=True)
    with pytest.raises(ValueError, match="max_shard_size"):
        model.save_pretrained(tmp_path / "m", max_shard_size="many")


def test_generation_config_is_read_and_written(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"max_new_tokens": 7, "repetition_penalty": 1.7, "eos_token_id": 5, "typical_p": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(options))
    ours = GPTJForCausalLM.from_pretrained(folder)
    assert "options without effect here: typical_p" in caplog.text
    assert ours.generation_config.max_new_tokens == 7
    ids = random_ids(1)
    theirs = transformers.GPTJForCausalLM.from_pretrained(folder)
    theirs.generation_config.typical_p = None
    assert torch.equal(ours.generate(ids), theirs.generate(ids))
    assert ours.generate(ids, max_length=13, eos_token_id=None).shape == (1, 13)
    ours.save_pretrained(tmp_path / "ours")
    written = read_json(tmp_path / "ours" / "generation_config.json")
    assert written == options
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "ours").max_new_tokens == 7


# --- outputs ---


def test_outputs_are_mappings_and_pytrees() -> None:
    ours, theirs = build_pair()
    ids = random_ids()
    out, expected = (model(ids, labels=ids, output_hidden_states=True) for model in (ours, theirs))
    assert list(out) == list(expected) == ["loss", "logits", "past_key_values", "hidden_states"]
    assert len(out) == len(expected) == 4
    assert out.get("attentions") is None
    assert out["loss"] is out.loss is out[0] is dict(out.items())["loss"]
    assert isinstance(out, dict)
    leaves, structure = pytree.tree_flatten(out)
    assert len(leaves) == 1 + 1 + 4 + 3
    rebuilt = pytree.tree_unflatten(leaves, structure)
    assert isinstance(rebuilt, CausalLMOutput)
    assert rebuilt.logits is out.logits
    assert len(rebuilt.past_key_values) == 2

    out["loss"] = out.loss * 2
    out.logits = None
    assert "logits" not in out
    out.attentions = (ids,)
    assert list(out) == ["loss", "past_key_values", "hidden_states", "attentions"]
    out.logits = ids
    assert list(out)[1] == "logits"
    with pytest.raises(KeyError, match="no 'other'"):
        out["other"] = 1
    assert pickle.loads(pickle.dumps(CausalLMOutput(logits=ids))).logits.tolist() == ids.tolist()


def test_negative_positions_are_refused() -> None:
    model, _ = build_pair()
    ids = random_ids()
    with pytest.raises(ValueError, match="at least 0, got -1"):
        model(ids, position_ids=torch.arange(-1, 10)[None])
