"""Every option of generate gives Transformers' texts; every other one is named in the error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from pair import assert_close, build_pair, padding_mask, random_ids
from test_ecosystem import byte_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from gptj_train.model.generation_config import (
    _OFF,
    _WITHOUT_EFFECT,
    GenerationConfig,
    changes_nothing,
    option_names,
)

PAD = 100
pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")

MASK = padding_mask([11, 4, 8], "left")
OPTIONS: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 0.5},
    {"bad_words_ids": [[word] for word in range(0, 60, 2)] + [[61, 63], [65, 67, 69]]},
    {"min_new_tokens": 5},
    {"min_length": 17},
    {"min_length": 3, "min_new_tokens": 6},
    {"logits_processor": transformers.LogitsProcessorList([lambda ids, scores: scores.index_fill(1, ids[0], -9.0)])},
    {"stopping_criteria": transformers.StoppingCriteriaList([lambda ids, scores, **_: ids[:, -1] % 3 == 0])},
]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_options(pair: tuple[Any, Any], options: dict[str, Any], beams: int) -> None:
    ours, theirs = pair
    ids = random_ids(3, 11)
    # Early ends, where the option delays them.
    ends = list(range(0, 100, 3)) if next(iter(options)).startswith("min") else [3]
    common = {"max_new_tokens": 12, "eos_token_id": ends, "pad_token_id": PAD, "num_beams": beams, **options}
    expected = theirs.generate(ids, attention_mask=MASK, do_sample=False, **common)
    assert torch.equal(ours.generate(ids, attention_mask=MASK, **common), expected)
    free = ours.generate(ids, attention_mask=MASK, **{name: common[name] for name in common.keys() - options.keys()})
    assert free.shape != expected.shape or not torch.equal(free, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 4},
        {"num_return_sequences": 2, "top_k": None, "temperature": 1.5},
        {"top_p": 0.7, "top_k": 0},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "top_k": 5},
        {"num_beams": 2, "top_p": 0.6, "temperature": 0.7, "eos_token_id": [3, 4, 5]},
    ],
)
def test_sampling_draws_what_transformers_draws(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    ids, texts = random_ids(3, 11), []
    for model in pair:
        torch.manual_seed(5)
        texts.append(model.generate(ids, attention_mask=MASK, do_sample=True, max_new_tokens=9, **options))
    assert torch.equal(*texts)


@pytest.mark.parametrize("num_return_sequences", [1, 3])
def test_several_beam_texts_and_their_scores(pair: tuple[Any, Any], num_return_sequences: int) -> None:
    ids = random_ids(2)
    options = {"num_beams": 3, "num_return_sequences": num_return_sequences, "max_new_tokens": 6}
    ours, theirs = (
        model.generate(ids, do_sample=False, return_dict_in_generate=True, output_scores=True, **options)
        for model in pair
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_close(ours.sequences_scores, theirs.sequences_scores)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.4, "min_new_tokens": 3, "eos_token_id": [7]}])
def test_scores(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    ids = random_ids(2)
    arguments = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    ours, theirs = (model.generate(ids, **arguments, **options) for model in pair)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.scores) == len(theirs.scores) == 5
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        kept = other.isfinite()
        assert torch.equal(mine.isfinite(), kept)
        assert_close(mine[kept], other[kept])
    assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"repetition_penalty": 1.5}, {"min_length": 15}])
def test_inputs_embeds(pair: tuple[Any, Any], options: dict[str, Any], use_cache: bool) -> None:
    ours, theirs = pair
    ids = random_ids(3, 11)
    embeds = ours.get_input_embeddings()(ids)
    # Transformers would leave out as many new tokens as the prompt has padding from the penalty.
    mask = torch.ones(3, 11) if "repetition_penalty" in options else MASK
    arguments = {"attention_mask": mask, "max_length": 19, "eos_token_id": [5], "pad_token_id": PAD, **options}
    found = ours.generate(inputs_embeds=embeds, use_cache=use_cache, **arguments)
    assert torch.equal(found, theirs.generate(inputs_embeds=embeds, do_sample=False, **arguments))
    if "repetition_penalty" not in options:
        assert torch.equal(found, ours.generate(ids, **arguments)[:, 11:])


def test_a_conversation_goes_on_from_its_cache(pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    first = ours.generate(random_ids(2), max_new_tokens=5, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, random_ids(2, 4)), dim=1)
    expected = ours.generate(longer, max_new_tokens=5)
    assert first.past_key_values.get_seq_length() == 15
    cache = copy.deepcopy(first.past_key_values)
    assert torch.equal(ours.generate(longer, past_key_values=first.past_key_values, max_new_tokens=5), expected)
    with pytest.raises(ValueError, match="past_key_values must hold fewer tokens"):
        ours.generate(longer[:, :15], past_key_values=cache, max_new_tokens=5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caches_of_transformers(pair: tuple[Any, Any], kind: str) -> None:
    ours, theirs = pair
    ids = random_ids(2)
    cache: Any = DynamicCache() if kind == "dynamic" else StaticCache(config=theirs.config, max_cache_len=30)
    with torch.no_grad():
        ours(ids[:, :6], past_key_values=cache)
        out = ours(ids[:, 6:], past_key_values=cache)
    assert out.past_key_values is cache
    assert_close(out.logits, theirs(ids).logits[:, 6:])
    text = ours.generate(ids, past_key_values=DynamicCache(), max_new_tokens=4)
    assert torch.equal(text, ours.generate(ids, max_new_tokens=4))
    with pytest.raises(ValueError, match="must be a cache with update and get_seq_length, got tuple"):
        ours(ids, past_key_values=((ids, ids),))


class Letters:
    """Decodes token i to the letter i, and the rest to dots."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + token) if token < 26 else "." for token in ids)


def test_stop_strings(pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    ids = random_ids(1)
    options: dict[str, Any] = {"max_new_tokens": 20, "bad_words_ids": [[word] for word in range(26, 101)]}
    text = ours.generate(ids, **options)
    letters = Letters().decode(text[0].tolist())
    stop = letters[14:17]
    end = letters.index(stop, 11 - 2) + 3
    out = ours.generate(ids, stop_strings=stop, tokenizer=Letters(), **options)
    assert torch.equal(out, text[:, :end])
    with pytest.raises(ValueError, match="stop_strings needs tokenizer"):
        ours.generate(ids, stop_strings="a")


@pytest.mark.parametrize("beams", [1, 2])
def test_stop_strings_of_a_batch(pair: tuple[Any, Any], beams: int) -> None:
    """With a real tokenizer: Transformers' criterion looks at its vocabulary."""
    ours, theirs = build_pair(vocab_size=257)
    tokenizer = byte_tokenizer()
    ids = torch.randint(97, 120, (3, 11))
    # Without an end token Transformers lets a finished row go on.
    options = {"max_new_tokens": 16, "num_beams": beams, "pad_token_id": 256, "eos_token_id": 255, "do_sample": False}
    free = ours.generate(ids, **options)
    text = tokenizer.decode(free[0, 11:])
    stops = [text[3:5], text[9]]
    expected = theirs.generate(ids, stop_strings=stops, tokenizer=tokenizer, **options)
    assert torch.equal(ours.generate(ids, stop_strings=stops, tokenizer=tokenizer, **options), expected)
    assert not torch.equal(expected, free)


def test_streamer(pair: tuple[Any, Any]) -> None:
    class Collector:
        def __init__(self) -> None:
            self.columns: list[Any] = []
            self.ended = False

        def put(self, value: Any) -> None:
            assert not self.ended
            self.columns.append(value)

        def end(self) -> None:
            self.ended = True

    ids, found = random_ids(1), []
    for model in pair:
        collector = Collector()
        model.generate(ids, max_new_tokens=4, do_sample=False, streamer=collector)
        assert collector.ended
        found.append(collector.columns)
    assert len(found[0]) == 5
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


def test_generation_config_of_either_library(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    ids = random_ids()
    config = transformers.GenerationConfig(max_new_tokens=6, repetition_penalty=1.6, do_sample=False)
    expected = theirs.generate(ids, generation_config=config)
    assert torch.equal(ours.generate(ids, generation_config=config), expected)
    assert torch.equal(ours.generate(inputs=ids, generation_config=config), expected)
    with pytest.raises(ValueError, match="does not offer penalty_alpha, set in generation_config"):
        ours.generate(ids, generation_config=transformers.GenerationConfig(penalty_alpha=0.6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"typical_p": 0.9, "penalty_alpha": 0.6}, "does not offer penalty_alpha, typical_p"),
        ({"max_new_token": 3}, "did you mean max_new_tokens"),
        ({"num_return_sequences": 2}, "needs do_sample=True or beams"),
        ({"num_return_sequences": 4, "num_beams": 2}, "at most num_beams"),
        ({"num_return_sequences": 0}, "at least 1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must be"),
        ({"num_beams": 2, "streamer": object()}, "streamer needs num_beams=1"),
        ({"num_beams": 2, "early_stopping": "often"}, 'early_stopping must be True, False or "never", got .often.'),
        ({"max_new_token": 1}, "does not offer max_new_token; did you mean max_new_tokens"),
        ({"forced_eos_token_id": 0}, "does not offer forced_eos_token_id"),
        ({"max_time": 1}, "does not offer max_time"),
        ({"use_model_defaults": False}, "does not offer use_model_defaults"),
        ({"assistant_early_exit": 1}, "does not offer assistant_early_exit"),
        ({"inputs_embeds": torch.zeros(2, 3, 32)}, "either input_ids or inputs_embeds"),
    ],
)
def test_refused(pair: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair[0].generate(random_ids(), **options)


def test_every_field_of_transformers_config_is_offered_or_refused_by_name(pair: tuple[Any, Any]) -> None:
    fields = vars(transformers.GenerationConfig()).keys()
    assert len(fields) > 50
    without = {name for name in fields if name not in option_names() and changes_nothing(name, object())}
    assert without == {name for name in fields if name in _WITHOUT_EFFECT or name.startswith("_")}
    # A field that a new version brings is in none of the three lists: look at it and put it into one.
    assert fields - option_names() - without == fields & _OFF.keys()
    for name in sorted(fields & _OFF.keys()):
        for call in ({name: 0.37}, {"generation_config": {name: 0.37}}):
            config = call.get("generation_config")
            arguments = call if config is None else {"generation_config": GenerationConfig.from_dict(config)}
            with pytest.raises(ValueError, match=f"does not offer {name}"):
                pair[0].generate(random_ids(), **arguments)


def test_configs_of_transformers_4(pair: tuple[Any, Any]) -> None:
    """They write all options out."""
    values = {
        **{"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "diversity_penalty": 0.0, "num_beam_groups": 1},
        **{"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "renormalize_logits": False},
        **{"remove_invalid_values": False, "output_attentions": False, "guidance_scale": 1, "penalty_alpha": 0},
        **{"early_stopping": False, "num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant"},
        **{"assistant_confidence_threshold": 0.4, "assistant_lookbehind": 10, "target_lookbehind": 10},
        **{"low_memory": False, "suppress_tokens": [], "token_healing": False, "disable_compile": False},
    }

    class Config:
        def to_dict(self) -> dict[str, Any]:
            return values

    ids = random_ids()
    out = pair[0].generate(ids, generation_config=Config(), max_new_tokens=3)
    assert torch.equal(out, pair[0].generate(ids, max_new_tokens=3))


def test_arguments_that_ask_for_nothing_are_accepted(pair: tuple[Any, Any]) -> None:
    ids = random_ids()
    out = pair[0].generate(ids, max_new_tokens=2, synced_gpus=False, assistant_model=None, typical_p=1.0)
    assert torch.equal(out, pair[0].generate(ids, max_new_tokens=2))


def test_appending_a_token_moves_that_token_alone(pair: tuple[Any, Any]) -> None:
    with torch.no_grad():
        cache = pair[0](random_ids(1, 20)).past_key_values
        pair[0](random_ids(1, 1), past_key_values=cache)
        places = [cache[layer][0].data_ptr() for layer in range(2)]
        for _ in range(20):
            pair[0](random_ids(1, 1), past_key_values=cache)
    assert [cache[layer][0].data_ptr() for layer in range(2)] == places
    assert cache.get_seq_length() == 41


class Concatenations(TorchDispatchMode):
    """Counts the elements of all concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.elements += out.numel()
        return out


@pytest.mark.parametrize("options", [{}, {"attention_mask": MASK}, {"inputs_embeds": torch.randn(3, 11, 32)}])
def test_a_token_costs_as_much_late_as_early(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    model = pair[0]
    caches: list[Any] = []
    hook = model.register_forward_hook(lambda _module, _arguments, out: caches.append(out.past_key_values))
    ids = None if "inputs_embeds" in options else random_ids(3)
    stream = model.stream(ids, max_new_tokens=50, **options)
    counts, places = [], set()
    for _ in range(50):
        with Concatenations() as found:
            next(stream)
        counts.append(found.elements)
        keys, values = caches[-1][1]
        places.add((keys.data_ptr(), values.data_ptr()))
    hook.remove()
    # The first token reads the prompt. A later one joins the rotated and the other dimensions of its own heads, only.
    assert set(counts[1:]) == {2 * 2 * 3 * 32}
    # Memory for all keys and values is there from the beginning, and no more than that.
    assert len(places) == 1
    assert keys._base is not None
    assert keys._base.shape == (3, 4, 61, 8)
