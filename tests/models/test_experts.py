"""Statistics of experts count real tokens only, in every model and whatever argument marks padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import contract_unless
from flax import nnx
from tiny import build

from attnax import (
    EncoderBlock,
    Transformer,
    TransformerConfig,
    TransformerLM,
    combine_masks,
    init_decoder_kv_caches_from_config,
    init_kv_layer_cache,
    make_causal_mask,
    masks,
)
from attnax.cache import EmptyCache
from attnax.models import MaskedLM
from attnax.nn import with_scan_layers

CONFIG = TransformerConfig(
    vocab_size=31,
    d_model=12,
    num_heads=3,
    num_layers=1,
    d_ff=8,
    max_len=13,
    num_experts=5,
    top_k=2,
    dropout_rate=0.0,
    pos_emb_type="rope",
)
LENGTH, PADDED = 5, 11
IDS = np.random.default_rng(0).integers(1, 31, (2, LENGTH))


def language_model(rngs):
    return TransformerLM(rngs, CONFIG)


def scanned(rngs):
    return with_scan_layers(TransformerLM(rngs, dataclasses.replace(CONFIG, num_layers=2)), True)


def encoder_decoder(rngs):
    return Transformer(rngs, encoder=dataclasses.replace(CONFIG, num_experts=3), decoder=CONFIG)


def plain(model, ids, real):
    return model.run(ids, padding_mask=real)


def both_halves(model, ids, real):
    return model.run(ids, ids[:, ::-1], source_padding_mask=real, target_padding_mask=real[:, ::-1])


def by_positions(model, ids, real):
    position_ids = jnp.where(real, jnp.cumsum(real, 1, dtype=jnp.int32) - 1, -1)
    return model.run(ids, mask=masks.documents(jnp.where(real, 0, -1)), position_ids=position_ids)


def by_mask(model, ids, real):
    return model.run(ids, mask=masks.padding(real))


def caches():
    return init_decoder_kv_caches_from_config(CONFIG, batch_size=2)


def into_empty_caches(model, ids, real):
    return model.run(ids, padding_mask=real, caches=tuple(map(EmptyCache, caches())))


def after_others(model, ids, real):
    return model.run(ids, padding_mask=real, caches=model.run(jnp.asarray(IDS[:, :2]), caches=caches()).caches)


def agree(step, *state):
    """`step` gives the same for the ids with padding on either side as without."""
    whole = step(*state, IDS, np.ones(IDS.shape, bool))
    for sides in ((0, PADDED - LENGTH), (PADDED - LENGTH, 0)):
        ids, real = (np.pad(x, ((0, 0), sides)) for x in (IDS, IDS > 0))
        for (path, one), (_, two) in zip(
            *map(jax.tree.leaves_with_path, (step(*state, ids, real), whole)), strict=True
        ):
            np.testing.assert_allclose(one, two, atol=2e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("make", "run"),
    [
        pytest.param(language_model, plain, id="LM"),
        pytest.param(scanned, plain, id="scanned LM", marks=pytest.mark.contract),
        pytest.param(lambda rngs: MaskedLM(rngs, CONFIG), plain, id="MaskedLM", marks=pytest.mark.contract),
        pytest.param(encoder_decoder, both_halves, id="Transformer", marks=pytest.mark.contract),
    ],
)
def test_padding_changes_no_statistic_of_a_model_and_no_gradient_of_one(make, run):
    graphdef, params, rest = nnx.split(build(make), nnx.Param, ...)

    def total(params, ids, real):
        aux = run(nnx.merge(graphdef, params, rest), ids, real).aux
        return aux["load_balance_loss"] + 0.1 * aux["router_z_loss"] - 0.3 * aux["router_entropy"], aux

    agree(jax.jit(jax.grad(total, has_aux=True)), params)


@pytest.mark.parametrize("run", [by_positions, by_mask, into_empty_caches, contract_unless(False, after_others)])
def test_padding_changes_no_statistic_however_a_model_learns_of_it(run):
    agree(nnx.jit(lambda model, ids, real: run(model, ids, real).aux), build(language_model))


def test_a_block_knows_padding_by_its_mask_or_its_positions():
    block = build(
        lambda rngs: EncoderBlock(rngs, d_model=12, num_heads=3, d_ff=8, num_experts=5, attention_type="standard")
    )
    x = jax.device_put(np.random.default_rng(0).normal(size=(1, 4, 12)).astype(np.float32))
    real, causal, index = np.arange(4)[None] < 3, masks.causal(), np.arange(4)
    padded, arrays = np.where(real, index, -1), combine_masks(make_causal_mask(4), real[:, None, None])
    forms = {
        "nothing": {"mask": causal},
        "lengths": {"mask": causal & masks.padding(np.array([3]))},
        "booleans": {"mask": masks.padding(real) & causal},
        "documents": {"mask": causal & masks.documents(np.where(real, 0, -1))},
        "an array": {"mask": arrays},
        "lengths at positions": {"mask": masks.at_positions(causal & masks.padding(np.array([3])), index, index)},
        "an array at positions": {"mask": masks.at_positions(masks.as_mask(arrays), index, index)},
        "positions of a mask": {"mask": masks.at_positions(causal, padded, padded)},
        "positions": {"mask": causal, "position_ids": padded},
        "lengths, into an empty cache": {
            "mask": causal & masks.padding(np.array([3])),
            "cache": EmptyCache(init_kv_layer_cache(1, 3, 4, 4)),
        },
    }
    run = nnx.jit(lambda block, x: {name: block.run(x, **options).aux for name, options in forms.items()})
    have = run(block, x)
    want = nnx.jit(lambda block, x: block.run(x, mask=causal).aux)(block, x[:, :3])
    for name, aux in have.items():
        told = np.isclose(aux["router_z_loss"], want["router_z_loss"], rtol=1e-6, atol=0)
        assert told == (name != "nothing") and set(aux) == set(want)
        if told:
            for key, value in aux.items():
                np.testing.assert_allclose(value, want[key], rtol=1e-6, atol=1e-6, err_msg=f"{name}: {key}")


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": np.ones((3, 1, 1, 4), bool)}, "mask must broadcast to"),
        ({"mask": masks.padding(np.ones((2, 5), bool))}, "mask must broadcast to"),
        ({"mask": masks.padding(np.array([3]))}, "one length a batch row"),
        ({"position_ids": np.zeros((2, 5), int)}, "position_ids_q must be integers of shape"),
    ],
)
def test_masks_and_positions_that_do_not_fit_are_still_refused_in_words(options, words):
    block = build(
        lambda rngs: EncoderBlock(rngs, d_model=12, num_heads=3, d_ff=8, num_experts=5, parallel_residual=True)
    )
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda x: block(x, **options), jax.ShapeDtypeStruct((2, 4, 12), "float32"))
