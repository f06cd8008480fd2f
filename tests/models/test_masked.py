"""What encoders like BERT have beside other models: token types, a norm of embeddings, a head with a bias."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnax import TransformerConfig, TransformerDecoder, TransformerEncoder, TransformerLM
from attnax.models import MaskedLM, SentenceEncoder

CONFIG = TransformerConfig(
    vocab_size=23,
    d_model=12,
    num_heads=3,
    num_layers=2,
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
    return TransformerEncoder(nnx.Rngs(0), CONFIG)


def test_embeddings_are_summed_and_normalised(encoder):
    tables = {name: getattr(encoder.embed, name).embedding[...] for name in ("tokens", "types", "positions")}
    assert {name: table.shape for name, table in tables.items()} == {
        "tokens": (23, 12),
        "types": (3, 12),
        "positions": (13, 12),
    }
    x = tables["tokens"][IDS] + tables["types"][TYPES] + tables["positions"][2:9][None]
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + CONFIG.norm_eps)
    np.testing.assert_allclose(encoder.embed(IDS, token_type_ids=TYPES), x, atol=1e-5)


def test_tokens_are_of_type_0_unless_said(encoder):
    plain = encoder(IDS)
    np.testing.assert_array_equal(plain, encoder(IDS, token_type_ids=np.zeros_like(IDS)))
    assert np.abs(plain - encoder(IDS, token_type_ids=TYPES)).max() > 1e-3


def test_what_token_types_and_positions_do_not_fit_is_refused(encoder):
    with pytest.raises(ValueError, match="token ids must be at least 0 and below 3; got 3"):
        encoder(IDS, token_type_ids=TYPES + 1)
    with pytest.raises(ValueError, match=r"positions must be at least 0 and below 11; got 11"):
        encoder(IDS, position_ids=np.arange(5, 12))
    untyped = TransformerEncoder(nnx.Rngs(0), dataclasses.replace(CONFIG, num_token_types=0))
    with pytest.raises(ValueError, match="token_type_ids need num_token_types of the config; got num_token_types=0"):
        untyped(IDS, token_type_ids=TYPES)
    with pytest.raises(ValueError, match="TransformerDecoder: token types are an encoder's; got num_token_types=3"):
        TransformerDecoder(nnx.Rngs(0), CONFIG)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_may_have_a_bias(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied, num_token_types=0)
    lm = TransformerLM(nnx.Rngs(0), config)
    before = lm(IDS)
    bias = lm.head.bias if tied else lm.head.projection.bias
    bias[...] = jnp.arange(23.0)
    np.testing.assert_allclose(lm(IDS), before + jnp.arange(23.0)[None, None], atol=1e-5)


def test_a_masked_language_model_learns_from_both_sides():
    lm = MaskedLM(nnx.Rngs(0), CONFIG)

    graphdef, state = nnx.split(lm)

    @jax.grad
    def gradient(state):
        return nnx.merge(graphdef, state)(IDS[:1], token_type_ids=TYPES[:1])[0, 3].sum()

    positions = gradient(state)["encoder"]["embed"]["positions"]["embedding"][...]
    assert (np.abs(positions).max(1) > 0).tolist() == [False] * 2 + [True] * 7 + [False] * 4
    log_probs = lm.log_probs(IDS, padding_mask=IDS > 3)
    np.testing.assert_allclose(jnp.exp(log_probs).sum(-1), 1.0, atol=1e-5)
    assert log_probs.shape == (2, 7, 23)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_padding_is_no_part_of_a_sentence(encoder, pool):
    embed = SentenceEncoder(encoder, pool=pool)
    real = np.arange(7) < np.array([[5], [7]])
    right = embed(IDS, padding_mask=real)
    left = embed(np.roll(IDS, 2, axis=1), padding_mask=np.roll(real[:1], 2, axis=1).repeat(2, 0))
    np.testing.assert_allclose(embed(IDS[:1, :5]), right[:1], atol=1e-6)
    np.testing.assert_allclose(left[:1], right[:1], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(right, axis=1), 1.0, atol=1e-6)


def test_a_sentence_of_padding_has_a_vector_and_a_gradient(encoder):
    graphdef, state = nnx.split(SentenceEncoder(encoder))

    def first(state):
        vectors = nnx.merge(graphdef, state)(IDS, padding_mask=np.arange(7) < np.array([[0], [7]]))
        return vectors.sum(), vectors

    gradients, vectors = jax.grad(first, has_aux=True)(state)
    assert (vectors[0] == 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_another_pool_is_refused(encoder, unchecked_shapes):
    with pytest.raises(ValueError, match="SentenceEncoder: pool must be one of cls, mean; got pool='max'"):
        SentenceEncoder(encoder, pool="max")
