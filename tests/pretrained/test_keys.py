"""Keys of a config.json that its family does not have: inert, ignored at the user's request, or refused."""

import pytest
from golden_copies import FOLDER, copy_with

from attnax.pretrained import CheckpointError, load_pretrained
from attnax.pretrained.families import FAMILIES
from attnax.pretrained.inert import is_inert
from attnax.pretrained.inspect import inspect_folder

PUBLISHED = {
    "distilbert_masked": {"tie_weights_": True},
    "gpt2": {"_num_labels": 1, "n_special": 0, "predict_special_tokens": True, "output_past": True},
    "llama2": {
        "is_llama_config": True,
        "rope_interleaved": False,
        "max_sequence_length": 2048,
        "transformers.js_config": {"dtype": "q4"},
        "unsloth_fixed": True,
        "quantization_config": None,
    },
    "phi3": {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "neftune_noise_alpha": 5},
    "gpt_neox": {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0},
    "qwen2": {"use_mrope": False, "attention_bias": False, "unsloth_version": "2025.1"},
    "t5": {"tie_encoder_decoder": False, "early_stopping": True, "length_penalty": 2.0, "no_repeat_ngram_size": 3},
    "vit": {"tie_word_embeddings": True},
    "gemma3": {"use_bidirectional_attention": None},
    "qwen3": {"aux_loss_alpha": 0.1, "embd_layer_norm": False},
    "mistral": {"is_decoder": None, "pruned_heads": None, "use_sliding_window": False, "bad_words_ids": None},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_of_published_files_that_change_nothing_are_passed_over(name, tmp_path):
    seen = inspect_folder(copy_with(name, tmp_path, **PUBLISHED[name]))
    assert not seen.refusals
    assert seen.config == inspect_folder(FOLDER / name).config
    assert list(seen.inert) == sorted(PUBLISHED[name].keys() - seen.family.known_keys)


def test_keys_that_are_passed_over_are_named_in_one_warning(tmp_path):
    with pytest.warns(UserWarning) as caught:
        load_pretrained(copy_with("gpt2", tmp_path, **PUBLISHED["gpt2"]))
    (warning,) = caught
    assert str(warning.message).endswith("results: _num_labels, n_special, output_past, predict_special_tokens.")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rope_interleaved", True), ("rope_interleaved", 0), ("tie_encoder_decoder", True), ("mlp_bias", True)),
        *(("attention_bias", True), ("is_causal", False), ("clip_qkv", 8.0), ("logit_scale", 0.5), ("alibi", True)),
        *(("use_sliding_window", True), ("partial_rotary_factor", 0.5), ("adapters", {"x": 1}), ("layer_types", ["a"])),
    ],
)
def test_a_value_that_would_change_something_is_not_inert(key, value):
    assert not is_inert(key, value)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_no_family_reads_a_key_that_others_pass_over_with_any_value(family):
    assert not {key for key in family.read_keys if is_inert(key, object())}


def test_a_key_that_is_not_known_is_refused_with_what_to_type(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"load_pretrained\(ignore=\('rope_interleaved',\)\), attnax generate --ignore rope_int"
    ):
        load_pretrained(copy_with("llama2", tmp_path, rope_interleaved=True))


def test_ignored_keys_are_not_there(tmp_path):
    folder = copy_with("gpt2", tmp_path, shiny=7, auto_map={}, quantization_config={"quant_method": "gptq"})
    seen = inspect_folder(folder, ignore=("shiny", "auto_map", "quantization_config"))
    assert not seen.refusals
    assert not seen.inert
    assert seen.config == inspect_folder(FOLDER / "gpt2").config


@pytest.mark.parametrize(
    ("ignore", "problem"),
    [
        (("shiny",), "config.json: it has no key 'shiny' to ignore"),
        (
            ("n_embd",),
            "config.json: 'n_embd' cannot be ignored: it decides what the model computes. Change it in the file",
        ),
        (("model_type",), "'model_type' cannot be ignored"),
        ("n_embd", r"load_pretrained: ignore must be several keys; got ignore='n_embd'. Give \('n_embd',\)"),
    ],
)
def test_what_cannot_be_ignored_is_said(ignore, problem):
    with pytest.raises(ValueError, match=problem):
        load_pretrained(FOLDER / "gpt2", ignore=ignore)
