"""The parts that only encoders like BERT have: token types, a norm of embeddings, a head with a bias."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import build

from attnax import TransformerConfig, TransformerDecoder, TransformerEncoder, TransformerLM
from attnax.models import MaskedLM, SentenceEncoder

CONFIG = TransformerConfig(
    vocab_size=23,
    d_model=12,
    num_heads=3,
    num_layers=1,
    d_ff=20,
    max_len=11,
    dropout_rate=0.0,
    pos_emb_type="learned",
    position_offset=2,
    num_token_types=3,
    embedding_norm=True,
    norm_placement="post",
    tie_embeddings=True,
    use_bias=("query", "key", "value", "out", "feed_forward", "norm", "head"),
)
IDS = np.random.default_rng(0).integers(0, 23, (2, 7))
TYPES = np.random.default_rng(1).integers(0, 3, (2, 7))


@pytest.fixture(scope="module")
def encoder():
    return build(lambda rngs: TransformerEncoder(rngs, CONFIG))


call = nnx.jit(lambda module, ids, **options: module(ids, **options))


def test_embeddings_are_summed_and_normalised(encoder):
    tables = {
        name: np.asarray(getattr(encoder.embed, name).embedding[...]) for name in ("tokens", "types", "positions")
    }
    assert {name: table.shape for name, table in tables.items()} == {
        "tokens": (23, 12),
        "types": (3, 12),
        "positions": (13, 12),
    }
    x = tables["tokens"][IDS] + tables["types"][TYPES] + tables["positions"][2:9][None]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + CONFIG.norm_eps)
    norm = encoder.embed.norm
    x = x * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(call(encoder.embed, IDS, token_type_ids=TYPES), x, atol=1e-5)


def test_tokens_are_of_type_0_unless_said(encoder):
    plain = np.asarray(call(encoder, IDS))
    np.testing.assert_array_equal(plain, call(encoder, IDS, token_type_ids=np.zeros_like(IDS)))
    assert np.abs(plain - call(encoder, IDS, token_type_ids=TYPES)).max() > 1e-3


def test_token_types_and_positions_that_do_not_fit_are_refused(encoder):
    with pytest.raises(ValueError, match="token ids must be at least 0 and below 3; got 3"):
        encoder(IDS, token_type_ids=TYPES + 1)
    with pytest.raises(ValueError, match=r"positions must be at least 0 and below 11; got 11"):
        encoder(IDS, position_ids=np.arange(5, 12))
    untyped = build(lambda rngs: TransformerEncoder(rngs, dataclasses.replace(CONFIG, num_token_types=0)))
    with pytest.raises(ValueError, match="token_type_ids need num_token_types of the config; got num_token_types=0"):
        untyped(IDS, token_type_ids=TYPES)
    with pytest.raises(ValueError, match="TransformerDecoder: token types are an encoder's; got num_token_types=3"):
        TransformerDecoder(nnx.Rngs(0), CONFIG)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_may_have_a_bias(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied, num_token_types=0)
    lm = build(lambda rngs: TransformerLM(rngs, config))
    before = np.asarray(call(lm, IDS))
    bias = lm.head.bias if tied else lm.head.projection.bias
    bias[...] = jax.device_put(np.asarray(bias[...]) + np.arange(23, dtype=np.float32))
    np.testing.assert_allclose(call(lm, IDS), before + np.arange(23), atol=1e-5)


def test_a_masked_language_model_learns_from_both_sides():
    lm = build(lambda rngs: MaskedLM(rngs, CONFIG))
    graphdef, state = nnx.split(lm)

    @jax.jit
    def run(state):
        lm = nnx.merge(graphdef, state)
        third = lambda state: nnx.merge(graphdef, state)(IDS[:1], token_type_ids=TYPES[:1])[0, 3].sum()
        return jax.grad(third)(state), lm.log_probs(IDS, padding_mask=IDS > 3)

    gradient, log_probs = run(state)
    positions = np.asarray(gradient["encoder"]["embed"]["positions"]["embedding"][...])
    assert (np.abs(positions).max(1) > 0).tolist() == [False] * 2 + [True] * 7 + [False] * 4
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1.0, atol=1e-5)
    assert log_probs.shape == (2, 7, 23)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_padding_is_no_part_of_a_sentence(encoder, pool):
    embed = SentenceEncoder(encoder, pool=pool)
    ids = np.concatenate([IDS, np.roll(IDS[:1], 2, axis=1), IDS[:1]])
    right = np.arange(7) < np.array([[5], [7], [0]])
    vectors = call(embed, ids, padding_mask=np.insert(right, 2, np.roll(right[0], 2), axis=0))
    np.testing.assert_allclose(call(embed, IDS[:1, :5]), vectors[:1], atol=1e-6)
    np.testing.assert_allclose(vectors[2], vectors[0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 0], atol=1e-6)


def test_a_sentence_of_padding_has_a_vector_and_a_gradient(encoder):
    graphdef, state = nnx.split(SentenceEncoder(encoder))

    @jax.jit
    def run(state):
        def first(state):
            vectors = nnx.merge(graphdef, state)(IDS, padding_mask=np.arange(7) < np.array([[0], [7]]))
            return vectors.sum(), vectors

        return jax.grad(first, has_aux=True)(state)

    gradients, vectors = run(state)
    assert (np.asarray(vectors)[0] == 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_another_pool_is_refused(encoder, unchecked_shapes):
    with pytest.raises(ValueError, match="SentenceEncoder: pool must be one of cls, mean; got pool='max'"):
        SentenceEncoder(encoder, pool="max")
