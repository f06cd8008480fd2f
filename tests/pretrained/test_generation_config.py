"""`generation_config.json` is read as transformers reads it; tests/generation compares the resulting texts."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
from tiny import build

from attnax import Sampler, Transformer, TransformerConfig, TransformerLM
from attnax.errors import InputError
from attnax.generation import TokenRules
from attnax.generation.candidates import CUTS
from attnax.pretrained import CheckpointError, GenerationSettings, load_generation_config
from attnax.pretrained.errors import quoted
from attnax.pretrained.generation_config import _UNSUPPORTED

KIND = {"d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 8, "max_len": 32}
PROMPT = np.array([[3, 1, 4, 1, 5]])


@pytest.fixture
def read(tmp_path):
    """The settings of a folder with the given files."""

    def call(said=None, **config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if said is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(said))
        return load_generation_config(str(tmp_path))

    return call


@pytest.fixture(scope="module")
def lm():
    return build(lambda rngs: TransformerLM(rngs, vocab_size=11, **KIND))


def equal(one, other):
    """Whether two samplers are equal, their arrays included."""
    fields = [(getattr(one, name), getattr(other, name)) for name in vars(one) if name != "logits_fn"]
    rules = [
        sampler.logits_fn and {name: np.asarray(x).tolist() for name, x in vars(sampler.logits_fn).items()}
        for sampler in (one, other)
    ]
    return all(a == b for a, b in fields) and rules[0] == rules[1]


@pytest.mark.parametrize(
    ("said", "sampler"),
    [
        ({}, Sampler()),
        ({"temperature": 0.6, "top_k": 3, "top_p": 0.9, "min_p": 0.1}, Sampler()),
        ({"do_sample": False, "temperature": 0.6}, Sampler()),
        ({"do_sample": True}, Sampler(1.0, top_k=50)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 0, "top_p": 0.9}, Sampler(0.6, top_p=0.9)),
        ({"do_sample": True, "min_p": 0.1, "top_p": 1.0, "top_k": None}, Sampler(1.0, top_k=50, min_p=0.1)),
        ({"do_sample": True, "top_p": 0}, Sampler()),
        ({"repetition_penalty": 1, "no_repeat_ngram_size": 0}, Sampler()),
        ({"repetition_penalty": 1.1, "no_repeat_ngram_size": 3}, Sampler(repetition_penalty=1.1, no_repeat_ngram=3)),
        ({"num_beams": 2, "repetition_penalty": 1.1}, Sampler(repetition_penalty=1.1)),
        ({"sequence_bias": [[[3], 1.5], [[4], -2], [[99], 1.0]]}, Sampler(logit_bias={3: 1.5, 4: -2.0})),
        ({"suppress_tokens": [3, 1]}, Sampler(logits_fn=TokenRules(suppress_tokens=np.array([3, 1])))),
        ({"suppress_tokens": []}, Sampler()),
        ({"begin_suppress_tokens": 2}, Sampler(logits_fn=TokenRules(begin_suppress_tokens=np.array([2])))),
        (
            {"bad_words_ids": [[5], [1, 2], [7]], "eos_token_id": 7},  # bad words that are end tokens are ignored
            Sampler(logits_fn=TokenRules(bad_words=np.array([[-1, 5], [1, 2]]))),
        ),
        (
            {"min_length": 8, "eos_token_id": 7},
            Sampler(logits_fn=TokenRules(end_tokens=np.array([7]), min_new_tokens=3)),
        ),
        (
            {"min_new_tokens": 2, "min_length": 8, "eos_token_id": 7},
            Sampler(logits_fn=TokenRules(end_tokens=np.array([7]), min_new_tokens=2)),
        ),
        ({"min_length": 8}, Sampler()),  # no end token
        ({"min_length": 4, "eos_token_id": 7}, Sampler()),  # the prompt counts
        ({"forced_bos_token_id": 4}, Sampler()),  # for prompts of one token only
        (
            {"forced_eos_token_id": [4], "max_new_tokens": 6},
            Sampler(logits_fn=TokenRules(forced_last=np.array([4]), max_new_tokens=6)),
        ),
    ],
)
def test_the_sampler_is_what_the_file_says(read, lm, said, sampler):
    assert equal(read(said).arguments(lm, PROMPT)["sampler"], sampler)


def test_a_forced_start_moves_what_is_suppressed_at_the_start(read, lm):
    settings = read({"forced_bos_token_id": 4, "begin_suppress_tokens": [2]})
    rules = settings.arguments(lm, PROMPT[:, :1])["sampler"].logits_fn
    assert (rules.forced_first, rules.begin_index) == (4, 1)
    rules = settings.arguments(lm, PROMPT)["sampler"].logits_fn
    assert (rules.forced_first, rules.begin_index) == (None, 0)


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ({}, {"max_new_tokens": 20, "end_token": []}),
        ({"max_length": 9, "eos_token_id": [2, 99]}, {"max_new_tokens": 4, "end_token": [2]}),
        ({"max_length": 9, "max_new_tokens": 7, "eos_token_id": 2}, {"max_new_tokens": 7, "end_token": [2]}),
        ({"do_sample": True, "num_return_sequences": 3}, {"max_new_tokens": 20, "end_token": [], "num_samples": 3}),
        (
            {"num_beams": 4, "num_return_sequences": 3},
            {"max_new_tokens": 20, "end_token": [], "num_beams": 4, "length_penalty": 1.0}
            | {"early_stopping": "heuristic"},
        ),
        (
            {"num_beams": 2, "length_penalty": 0.6, "early_stopping": True, "max_new_tokens": 3},
            {"max_new_tokens": 3, "end_token": [], "num_beams": 2, "length_penalty": 0.6, "early_stopping": "first"},
        ),
    ],
)
def test_the_other_options_are_what_the_file_says(read, lm, said, options):
    found = read(said).arguments(lm, PROMPT)
    del found["sampler"]
    assert found == options | ({"num_samples": 1} if said.get("do_sample") and "num_samples" not in options else {})


def test_an_encoder_decoder_counts_its_start_token(read):
    config = TransformerConfig(vocab_size=11, **KIND)
    model = build(lambda rngs: Transformer(rngs, encoder=config, decoder=config))
    settings = read({"max_length": 9, "min_length": 4, "eos_token_id": 2, "bos_token_id": 1}, decoder_start_token_id=5)
    options = settings.arguments(model, PROMPT)
    assert (options["max_length"], options["start_token"], options["end_token"]) == (8, 5, [2])
    assert options["sampler"].logits_fn.min_new_tokens == 3
    with pytest.raises(InputError, match="needs a decoder_start_token_id"):
        GenerationSettings().arguments(model, PROMPT)


def test_where_no_position_is_left_fewer_tokens_are_written(read, lm):
    assert read().arguments(lm, np.ones((1, 20), int))["max_new_tokens"] == 12


def test_without_the_file_an_old_config_says_it(read):
    settings = read(num_beams=4, max_length=12, eos_token_id=3, hidden_size=8, guidance_scale=None)
    assert (settings.num_beams, settings.max_length, settings.eos_token_id) == (4, 12, (3,)) and settings.says_how


def test_beside_the_file_a_config_names_tokens_only(read):
    settings = read({"top_k": 7, "eos_token_id": None}, num_beams=4, eos_token_id=3, bos_token_id=[1])
    assert (settings.num_beams, settings.eos_token_id, settings.bos_token_id, settings.top_k) == (1, (3,), 1, 7)


def test_tokens_alone_do_not_say_how_to_write(read):
    assert not read({"eos_token_id": 3, "repetition_penalty": 1.1}).says_how and read({"top_p": 0.9}).says_how


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"guidance_scale": 1.5, "penalty_alpha": 0.6}, "guidance_scale=1.5, penalty_alpha=0.6"),
        ({"do_sample": True, "typical_p": 0.9, "epsilon_cutoff": 1e-4}, "typical_p=0.9, epsilon_cutoff=0.0001"),
        ({"num_beams": 2, "do_sample": True}, "do_sample=True"),
        ({"num_beams": 2, "renormalize_logits": True}, "renormalize_logits=True"),
        ({"num_return_sequences": 2}, "num_return_sequences=2"),
        ({"sequence_bias": [[[1, 2], 3.0]]}, "sequence_bias=[[[1, 2], 3.0]]"),
        ({"something_of_tomorrow": [1]}, "something_of_tomorrow=[1]"),
    ],
)
def test_what_has_no_place_is_named_in_one_warning(read, said, named):
    with pytest.warns(UserWarning) as caught:
        read(said)
    (warning,) = caught
    assert str(warning.message).endswith(f"not supported, and left out: {named}.")


@pytest.mark.parametrize(
    "said",
    [
        {"typical_p": 0.9, "eta_cutoff": 1e-3, "renormalize_logits": True},  # nothing is drawn or searched
        {"typical_p": 1.0, "guidance_scale": 1, "encoder_repetition_penalty": 1.0, "num_beam_groups": 1},
        {"transformers_version": "5.24.0", "pad_token_id": 0, "use_cache": False, "_from_model_config": True},
        {"cache_implementation": "hybrid", "prompt_lookup_num_tokens": 3, "return_dict_in_generate": True},
        {"constraints": None, "something_of_tomorrow": None},
    ],
)
def test_what_changes_no_text_is_passed_over_in_silence(read, said):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(said).unsupported == {}


def test_stop_strings_are_named_where_there_is_no_tokenizer(read, lm):
    settings = read({"stop_strings": ["\n\n", "end"]})
    assert settings.stop_strings == ("\n\n", "end")
    with pytest.warns(UserWarning, match="stop_strings=.* end nothing without a tokenizer. Give stop_sequences"):
        settings.arguments(lm, PROMPT)


WRONG = {
    "do_sample": 1,
    "temperature": "hot",
    "top_k": 0.5,
    "top_p": 1.5,
    "min_p": -0.1,
    "repetition_penalty": 0,
    "no_repeat_ngram_size": -1,
    "sequence_bias": [[3, 1.0]],
    "bad_words_ids": [3],
    "min_new_tokens": True,
    "suppress_tokens": [-1],
    "forced_bos_token_id": [1, 2],
    "num_beams": 0,
    "length_penalty": 10**400,
    "early_stopping": "always",
    "max_length": 2**31,
    "stop_strings": ["\ud800"],
}


def test_values_out_of_range_are_refused_all_at_once(read):
    with pytest.raises(CheckpointError) as caught:
        read(WRONG)
    assert len(caught.value.problems) == len(WRONG) and "generation_config.json" in str(caught.value)
    for (key, value), problem in zip(WRONG.items(), caught.value.problems, strict=True):
        assert problem.startswith(f"{key} must be ") and problem.endswith(f"; got {key}={quoted(value)}.")
    with pytest.raises(CheckpointError, match="num_return_sequences must be at most num_beams=2"):
        read({"num_beams": 2, "num_return_sequences": 3})


def test_what_cannot_be_written_is_refused(read, lm):
    with pytest.raises(InputError, match="max_length=5 .* leaves no room after the prompt's 5 tokens"):
        read({"max_length": 5}).arguments(lm, PROMPT)
    with pytest.raises(InputError, match="forced_eos_token_id must be below vocab_size=11; got .*11"):
        read({"forced_eos_token_id": 11}).arguments(lm, PROMPT)


@pytest.mark.parametrize("name", ["temperature", "min_p", "repetition_penalty"])
def test_settings_that_are_fields_of_a_sampler_have_its_limits(read, name):
    for value in (-1.0, 0.0, 1e-50, 0.5, 1.0, 1.5, 1e30, 1e39):
        try:
            Sampler(**{name: value})
        except ValueError as error:
            rule = str(error).removeprefix("Sampler: ")
            with pytest.raises(CheckpointError) as caught:
                read({name: value})
            assert caught.value.problems == (rule,)
        else:
            assert getattr(read({name: value}), name) == value


def test_fields_of_a_sampler_are_supported():
    assert _UNSUPPORTED.keys().isdisjoint(field.name for field in dataclasses.fields(Sampler))
    settings = GenerationSettings(do_sample=True)
    assert settings.drawing().keys() == {"temperature"} | (vars(settings).keys() & set(CUTS))
