"""Models are written as checkpoints, and refused where no family has a place for them."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_copies import FOLDER, KIND, NAMES, check_parameters, check_same, config_of, load, read_config, tensors_of
from tiny import build

from attnax import Transformer, TransformerLM, masks
from attnax.models import SentenceEncoder
from attnax.nn import with_scan_layers
from attnax.pretrained import CheckpointError, load_pretrained, save_pretrained


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_was_read(name, tmp_path):
    save_pretrained(load(name), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: config[key] for key in KIND} == {key: config_of(name)[key] for key in KIND}
    read, written = tensors_of(FOLDER / name), tensors_of(tmp_path)
    left_out = {"embeddings.mask_token"} & read.keys()
    assert read.keys() - left_out == written.keys()
    for tensor in written:
        value = read[tensor]
        assert (written[tensor].dtype, written[tensor].tobytes()) == (value.dtype, value.tobytes())
    assert read_config(tmp_path) == read_config(FOLDER / name)


@pytest.mark.contract
@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_again(name, tmp_path):
    save_pretrained(load(name), tmp_path)
    model, tokenizer = load_pretrained(tmp_path)
    assert tokenizer is None
    check_same(model, load(name))


SIZES = {"vocab_size": 11, "d_model": 12, "num_heads": 3, "num_layers": 3, "d_ff": 20, "max_len": 16}
LLAMA = {"norm_type": "rms", "pos_emb_type": "rope", "ff_activation": "swiglu", "use_bias": False}


def test_a_model_is_written_as_the_family_that_has_a_place_for_all_of_it(tmp_path):
    for fields, expected in (
        (LLAMA | {"num_kv_heads": 1, "rope_scaling": {"kind": "linear", "factor": 2.0}}, "llama"),
        ({"pos_emb_type": "learned", "tie_embeddings": True, "attention_scale": 1.0}, "gpt2"),
    ):
        model = build(lambda rngs, fields=fields: TransformerLM(rngs, **SIZES, **fields))
        save_pretrained(model, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == expected
        read, _ = load_pretrained(tmp_path)
        assert read.config == dataclasses.replace(model.config, dropout_rate=0.0)
        check_parameters(read, model)


def test_a_model_is_written_as_what_it_was_loaded_as_while_that_fits(tmp_path):
    def written(model, **options):
        save_pretrained(model, tmp_path, **options)
        return json.loads((tmp_path / "config.json").read_text())["model_type"]

    model, scan = load("mistral_variant"), nnx.jit(with_scan_layers, static_argnums=1)
    for other in (nnx.merge(*nnx.split(model)), nnx.clone(model), copy.deepcopy(model), scan(model, True)):
        assert written(other) == "mistral"
    assert written(model, family="llama") == "llama"
    other = build(lambda rngs: TransformerLM(rngs, dataclasses.replace(model.config, rope_fraction=4 / 6)))
    other.loaded_as = "mistral"
    assert written(other) == "phi3"  # mistral rotates whole heads
    assert written(SentenceEncoder(load("xlm_roberta"))) == "xlm-roberta"


def test_layers_that_are_scanned_are_written_as_others(tmp_path):
    model = load("gpt2")
    save_pretrained(nnx.jit(with_scan_layers, static_argnums=1)(model, True), tmp_path)
    check_same(load_pretrained(tmp_path)[0], model)


def test_a_model_of_two_dtypes_is_written(tmp_path):
    model = build(lambda rngs: TransformerLM(rngs, **SIZES, **LLAMA))
    for name, dtype in (("embed", jnp.bfloat16), ("norm", jnp.float16)):
        part = getattr(model.decoder, name)
        nnx.update(part, jax.tree.map(lambda array, dtype=dtype: np.asarray(array, dtype), nnx.state(part, nnx.Param)))
    save_pretrained(model, tmp_path)
    assert load_pretrained(tmp_path)[0].config.dtype == "float32"


def test_a_model_that_no_family_has_a_place_for_is_refused_in_words(tmp_path):
    def refused(model, problem, **options):
        with pytest.raises(CheckpointError, match=problem):
            save_pretrained(model, tmp_path / "new", **options)

    def lm(**fields):
        return nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), **SIZES, **fields))

    refused(
        lm(**LLAMA, attention_soft_cap=5.0), "as llama: attention_soft_cap=5.0 has no place in it; it would be .*None"
    )
    refused(
        lm(**LLAMA),
        "save_pretrained, as gpt2: ff_activation must be one of gelu_tanh, .*; got ff_activation='swiglu'",
        family="gpt2",
    )
    refused(lm(**LLAMA), "family of a TransformerLM must be one of llama, .*; got 'bert2'", family="bert2")
    refused(
        lm(**LLAMA | {"rope_scaling": {"kind": "ntk", "factor": 2.0}}), "rope_scaling must be one of default, linear"
    )
    refused(lm(**LLAMA | {"ff_activation": "relu2"}), "ff_activation must be one of")
    refused(lm(**LLAMA, layer_pattern=[{"rope_base": 5.0}, {}]), r"rope_base=\[5.0, 10000.0, 5.0\] has no place in it")
    refused(
        nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))), "model must be one of TransformerLM.*; got Linear"
    )
    refused(lm(**LLAMA, self_mask=masks.sliding_window(3)), "self_mask must be the causal one")
    assert not (tmp_path / "new").exists()


def test_an_encoder_decoder_that_t5_has_no_place_for_is_refused():
    encoder = load("t5").config.encoder
    deeper = {"num_layers": 3, "tie_embeddings": True, "logit_scale": encoder.d_model**-0.5}
    for changed, shared, problem in (
        (deeper | {"d_ff": 7}, True, "decoder.d_ff=7 has no place in it; it would be read as 37"),
        (deeper, False, "share_embeddings=False has no place in it"),
        (deeper | {"logit_scale": 0.5}, True, "logit_scale must be 1 or d_model"),
    ):
        decoder = dataclasses.replace(encoder, **changed)
        model = nnx.eval_shape(
            lambda decoder=decoder, shared=shared: Transformer(
                nnx.Rngs(0), encoder=encoder, decoder=decoder, share_embeddings=shared
            )
        )
        with pytest.raises(CheckpointError, match=problem):
            save_pretrained(model, "nowhere")
