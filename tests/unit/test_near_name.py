"""A path that does not exist is answered with the one that was probably meant, whichever key it is given for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.inference.text_generator import read_prompts
from gptj_train.launch.hub import fetch
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.near_name import near_name
from gptj_train.training.retention import newest_complete, resume_candidates


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("models/gptj_small", "models/gptj-small"),
        ("modles/gptj-small", "models/gptj-small"),
        ("modles/gptj-small/", "models/gptj-small"),
        ("modles/other", "models"),
        ("models\\gptj-small", "models/gptj-small"),
        ("models/gptj-small", None),  # it is there
        ("models/quite_another", None),
        ("", None),
    ],
)
def test_the_nearest_path_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, meant: str | None
) -> None:
    (tmp_path / "models" / "gptj-small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert near_name(wrong) == (f"did you mean {meant!r}?; " if meant else "")
    if "\\" not in wrong and wrong:
        said = near_name(tmp_path / wrong)
        assert said == (f"did you mean {str(tmp_path / meant)!r}?; " if meant else "")


LOADERS: dict[str, Callable[[str], object]] = {
    "init_from and checkpoint": GPTJConfig.from_pretrained,
    "tokenizer": Tokenizer.load,
    "run": newest_complete,
    "resume": lambda path: resume_candidates("unused", path),
    "prompts": lambda path: read_prompts(path, 1),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_every_key_with_a_path_offers_it(tmp_path: Path, load: Callable[[str], object]) -> None:
    (tmp_path / "my_model").mkdir()
    with pytest.raises(UserError, match=rf"did you mean '{tmp_path}/my_model'\?; ") as caught:
        load(f"{tmp_path}/my_modle")
    assert "\n" not in str(caught.value)


def test_a_hub_id_that_is_a_misspelt_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    with pytest.raises(UserError, match=r"init_from=runs/frist: did you mean 'runs/first'\?; no such folder here"):
        fetch("runs/frist", "init_from", revision=None, weights=True)
