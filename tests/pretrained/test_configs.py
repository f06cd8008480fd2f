"""A config.json has the meaning that it has in transformers, or is refused in words."""

import math
from pathlib import Path

import pytest
from golden_copies import KIND, config_of, copy_with

from attnax.pretrained import CheckpointError, load_pretrained
from attnax.pretrained.inspect import find_family


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"model_type": "llama5"}, "model_type must be one of llama, .*; got model_type='llama5'"),
        ({"model_type": ["llama"]}, "model_type must be one of"),
        (
            {"architectures": ["LlamaForTokenClassification"]},
            "architectures must be one of LlamaForCausalLM, LlamaModel, .*; got",
        ),
        ({"shiny_new_trick": 7}, "shiny_new_trick=7 is no field of llama that is known here"),
        ({"hidden_size": "36"}, "hidden_size must be a whole number of at least 0 .*; got hidden_size='36'"),
        ({"hidden_size": None}, "hidden_size must be a whole number"),
        ({"hidden_size": 1 << 40}, "hidden_size must be a whole number"),
        ({"hidden_act": "mish"}, "hidden_act must be one of silu, .*; got hidden_act='mish'"),
        ({"rms_norm_eps": True}, "rms_norm_eps must be a number"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"is_decoder": True}, "is_decoder must be False, which is all that is supported; got is_decoder=True"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object or null"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type must be one of default, linear"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "more": 1}}, "rope_type='linear' must have no"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor must be a number; got factor=None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor must be at least 1"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "must have low_freq_factor and high_freq_factor"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": math.e, "mscale": 1, "mscale_all_dim": -10}},
            "mscale and mscale_all_dim must be above 0",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0, "mscale": 1, "mscale_all_dim": 1}}, "factor must be"),
        ({"pad_token_id": "junk"}, "pad_token_id must be a token, or null; got pad_token_id='junk'"),
        ({"hidden_act": "x" * 1000}, f"got hidden_act='{'x' * 59}\\.\\.\\.\\."),
        ({"num_key_value_heads": 4}, "num_heads must be a multiple of num_kv_heads"),
        ({"num_hidden_layers": 100_000}, "its 21 tensors do not fit num_layers=100000"),
        ({"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight' is missing"),
        ({"num_hidden_layers": 1}, r"'model.layers.1.input_layernorm.weight' is float32\(36,\); no such tensor"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_understood_is_refused_in_words(tmp_path, fields, problem):
    with pytest.raises(CheckpointError, match=problem):
        load_pretrained(copy_with("llama2", tmp_path, **fields))


def test_two_names_of_the_rotary_positions_must_say_the_same(tmp_path):
    for name in ("llama2", "gemma3"):
        with pytest.raises(CheckpointError, match="must be equal if both are present; got rope_base"):
            load_pretrained(copy_with(name, tmp_path, rope_scaling={"rope_type": "linear", "factor": 2.0}))


LLAMA3_ROPE = dict(config_of("llama3")["rope_parameters"])
YARN_ROPE = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 19}
YARN_FACTOR = {"attention_factor": 0.1 * math.log(3.0) + 1.0}
YARN_RATIO = {"attention_factor": (0.07 * math.log(3.0) + 1.0) / (0.04 * math.log(3.0) + 1.0)}
DEFAULT_ROPE = {"rope_type": "default"}


@pytest.mark.parametrize(
    ("said", "same"),
    [
        ({"rope_parameters": {"rope_theta": 10000.0}, "rope_scaling": DEFAULT_ROPE}, {}),
        (
            {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": DEFAULT_ROPE, "rope_theta": 5.0},
            {"rope_theta": 5.0},
        ),
        ({"rope_parameters": LLAMA3_ROPE, "rope_scaling": LLAMA3_ROPE}, {"rope_parameters": LLAMA3_ROPE}),
        ({"rope_parameters": LLAMA3_ROPE, "rope_scaling": None}, {"rope_parameters": LLAMA3_ROPE}),
        ({"rope_parameters": None, "rope_scaling": LLAMA3_ROPE}, {"rope_parameters": LLAMA3_ROPE}),
        ({"rope_scaling": YARN_ROPE | {"mscale": 0.7} | YARN_FACTOR}, {"rope_scaling": YARN_ROPE | YARN_FACTOR}),
        ({"rope_scaling": YARN_ROPE | {"mscale": 0.7}}, {"rope_scaling": YARN_ROPE}),
        ({"rope_scaling": YARN_ROPE | {"mscale_all_dim": 0.7}}, {"rope_scaling": YARN_ROPE}),
        ({"rope_scaling": YARN_ROPE | {"truncate": None}}, {"rope_scaling": YARN_ROPE | {"truncate": False}}),
        ({"rope_scaling": YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 0}}, {"rope_scaling": YARN_ROPE}),
        (
            {"rope_scaling": YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 0.4}},
            {"rope_scaling": YARN_ROPE | YARN_RATIO},
        ),
        ({"rope_scaling": YARN_ROPE | {"finetuned": True}}, {"rope_scaling": YARN_ROPE}),
        ({"rope_scaling": YARN_ROPE | {"low_freq_factor": 5.0, "beta_fast": None}}, {"rope_scaling": YARN_ROPE}),
        ({"rope_scaling": YARN_ROPE | {"type": "linear"}}, {"rope_scaling": YARN_ROPE}),
        ({"rope_scaling": YARN_ROPE | {"factor": None}}, {"rope_scaling": YARN_ROPE | {"factor": 67 / 19}}),
        (
            {"rope_scaling": YARN_ROPE, "original_max_position_embeddings": 31},
            {"rope_scaling": YARN_ROPE | {"original_max_position_embeddings": 31}},
        ),
        ({"rope_scaling": LLAMA3_ROPE | {"beta_fast": 5.0} | YARN_FACTOR}, {"rope_scaling": LLAMA3_ROPE}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "truncate": False, "partial_rotary_factor": 1.0}},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        ({"rope_scaling": DEFAULT_ROPE | {"factor": 5.0}, "original_max_position_embeddings": 5}, {}),
    ],
)
def test_what_is_said_of_rotary_positions_means_what_it_means_in_transformers(said, same):
    plain = {key: value for key, value in config_of("llama2").items() if key != "rope_parameters"}
    family = find_family(plain, Path("config.json"))
    got, expected = (family.read_config(plain | fields, "config.json") for fields in (said, same))
    assert got == expected


def test_rope_scaling_beside_the_rotary_positions_of_each_kind_of_layer_is_that_of_global_ones():
    config = config_of("gemma3")
    family = find_family(config, Path("config.json"))
    expected = family.read_config(config, "config.json")
    for beside in ({"type": "linear", "factor": 2.5}, {"rope_theta": 3000.0}, {}):
        more = {"rope_scaling": beside, "original_max_position_embeddings": 5}
        assert family.read_config(config | more, "config.json") == expected


def test_all_that_is_wrong_with_a_config_is_said_at_once(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(copy_with("llama2", tmp_path, hidden_size=-1, hidden_act=3, new=1))
    assert [problem.split(" ")[0].split("=")[0] for problem in caught.value.problems] == [
        "hidden_act",
        "hidden_size",
        "new",
    ]
    with pytest.raises(CheckpointError, match="3 problems"):
        raise caught.value


def test_an_mt5_by_the_name_of_t5_is_refused(tmp_path):
    """T5 would divide its logits by the square root of the width."""
    kind = {key: config_of("t5")[key] for key in KIND}
    with pytest.raises(CheckpointError, match="tie_word_embeddings=True is of mT5.*Set model_type to 'mt5'"):
        load_pretrained(copy_with("mt5_variant", tmp_path, **kind))


def test_configs_of_t5_that_contradict_themselves_are_refused(tmp_path):
    for fields, problem in (
        ({"is_gated_act": False}, "is_gated_act must be True, as feed_forward_proj has it; got is_gated_act=False"),
        ({"dense_act_fn": "relu"}, "dense_act_fn must be 'gelu_new', as feed_forward_proj has it"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder must be True"),
        ({"relative_attention_num_buckets": 32, "relative_attention_max_distance": 11}, "max_distance must be"),
        ({"num_layers": 10**6}, "its 52 tensors do not fit num_layers=1000000"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            load_pretrained(copy_with("t5_variant", tmp_path, **fields))
