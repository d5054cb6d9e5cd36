"""No secret reaches a config, whatever way it is named, and harmless variables may be read."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from gptj_train.errors import UserError
from gptj_train.schema import PlainText, schema, validated


@schema
class Small:
    """A config with a free text, a prompt and a block of any keys."""

    name: str
    prompt: PlainText
    block: dict[str, Any]


def value_of(name: str, prompt: str = "", **block: Any) -> str:
    composed = OmegaConf.create({"name": name, "prompt": prompt, "block": block})
    return validated(composed, Small).name


def refusal(*arguments: str, **block: Any) -> str:
    with pytest.raises(UserError) as caught:
        value_of(*arguments, **block)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "expression",
    [
        "${oc.env:WANDB_API_KEY}",
        "${oc.env:'WANDB_API_KEY'}",
        '${oc.env:"WANDB_API_KEY"}',
        "${ oc.env : WANDB_API_KEY }",
        "${oc.env:WANDB_${block.rest}}",
        "${oc.env:${block.whole}}",
        "${${block.library}.env:WANDB_API_KEY}",
        "${oc.decode:'\\${oc.env:WANDB_API_KEY}'}",
        "${oc.env:SLURM_NOWHERE,${oc.env:WANDB_API_KEY}}",
        "${oc.select:nowhere,${oc.env:WANDB_API_KEY}}",
    ],
)
def test_a_secret_is_never_read(expression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    message = refusal(expression, rest="API_KEY", whole="WANDB_API_KEY", library="oc")
    assert "0123456789abcdef" not in message
    # An expression that OmegaConf itself does not accept is refused as well.
    assert "${oc.env:WANDB_API_KEY} may be a secret" in message or message.startswith("config: ")


@pytest.mark.parametrize("variable", ["DATABASE_URL", "PGPASS", "GITHUB_PAT", "SLURM_JWT", "MY_SETTING", "HOME_X", ""])
def test_variables_off_the_list(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if variable:
        monkeypatch.setenv(variable, "value of it")
    assert "value of it" not in refusal(f"${{oc.env:'{variable}'}}")


def test_variables_on_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert value_of("${oc.env:SCRATCH}/runs") == "/scratch/me/runs"
    assert value_of("${oc.env:SLURM_JOB_ID,none}") == "none"
    assert refusal("${oc.env:SLURM_JOB_ID}") == "name: ${oc.env:SLURM_JOB_ID} is not set"


@pytest.mark.parametrize("key", ["api_key", "API_KEY", "hub_token", "password", "pgpass", "github_pat", "database_url"])
def test_keys_with_a_secrets_name(key: str) -> None:
    assert refusal("x", **{key: "abc"}).startswith(f"block.{key} looks like a secret; ")
    assert refusal("x", inner=[{key: "abc"}]).startswith(f"block.inner.{key} looks like a secret; ")


def test_values_of_secret_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("SOME_TOKEN", "1")  # too short to be one
    line = "contains the value of the environment variable HF_TOKEN"
    assert f"name {line}" in refusal("run-hf_abcdefgh-1")
    assert f"prompt {line}" in refusal("x", "my token is hf_abcdefgh")
    assert "hf_abcdefgh" not in refusal("hf_abcdefgh")
    assert value_of("run-1") == "run-1"


def test_urls_with_passwords() -> None:
    assert refusal("https://me:hunter2@host/x").startswith("name is a URL with a password; ")
    assert value_of("https://host:8080/x@y", "https://me:hunter2@host/x") == "https://host:8080/x@y"
