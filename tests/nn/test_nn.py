"""Layers: against the reference, exact positions, and wrong input in words."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import attnax
from attnax import masks, nn, reference
from attnax.nn.blocks import Residual

attention = nn.MultiHeadAttention


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def reference_params(attn, d_model, num_heads, num_kv_heads, head_dim):
    """The layer's weights as the reference takes them, with each shared key head written out."""
    share = num_heads // num_kv_heads
    query = attn.query.kernel[...].reshape(d_model, num_heads, head_dim)
    key, value = (
        np.repeat(layer.kernel[...].reshape(d_model, num_kv_heads, head_dim), share, axis=1)
        for layer in (attn.key, attn.value)
    )
    return reference.AttentionParams(
        query, jnp.asarray(key), jnp.asarray(value), attn.out.kernel[...].reshape(num_heads, head_dim, -1)
    )


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("cross", [False, True])
def test_attention_equals_the_reference(num_kv_heads, cross):
    attn = attention(
        nnx.Rngs(0), num_heads=6, in_features=11, num_kv_heads=num_kv_heads, qkv_features=18, use_bias=False
    )
    x, context = normal(1, 2, 5, 11), normal(2, 2, 7, 11) if cross else None
    source = x if context is None else context
    mask = np.arange(source.shape[1]) != 2
    params = reference_params(attn, 11, 6, num_kv_heads, 3)
    expected = reference.multi_head_attention(
        params, x, source, source, jnp.broadcast_to(mask, (2, 5, source.shape[1]))
    )
    np.testing.assert_allclose(attn(x, context=context, mask=mask), expected, atol=2e-6)


def test_attention_from_a_config_and_from_keywords_is_the_same():
    config = attnax.BlockConfig(d_model=12, num_heads=3, num_kv_heads=1, dropout_rate=0.0)
    one = attention(nnx.Rngs(0), config)
    two = attention(nnx.Rngs(0), in_features=12, num_heads=3, num_kv_heads=1, dropout_rate=0.0)
    x = normal(1, 1, 5, 12)
    np.testing.assert_array_equal(one(x), two(x))


def test_any_attention_function_obeying_the_protocol_fits():
    seen = {}

    def mean_values(
        query, key, value, *, mask=None, score_mod=None, dropout_rng=None, dropout_rate=0.0, deterministic=True
    ):
        seen.update(mask=mask, shape=query.shape, score_mod=score_mod)
        return jnp.broadcast_to(value.mean(2, keepdims=True), query.shape)

    attn = attention(nnx.Rngs(0), in_features=12, num_heads=3, attention_fn=mean_values)
    out = attn(normal(1, 2, 5, 12), mask=masks.causal())
    assert out.shape == (2, 5, 12) and seen["shape"] == (2, 3, 5, 4)
    assert seen["mask"].shape == (2, 3, 5, 5) and seen["mask"].dtype == bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadBias:
    bias: jax.Array

    def __call__(self, scores, b, h, q, kv):
        return scores + self.bias[h] * (q - kv)


def test_score_mods_of_construction_and_call_apply_in_order():
    double = lambda scores, b, h, q, kv: scores * 2
    shift = lambda scores, b, h, q, kv: scores + kv
    both = lambda scores, b, h, q, kv: scores * 2 + kv
    x = normal(1, 1, 5, 12)
    expected = attention(nnx.Rngs(0), in_features=12, num_heads=3)(x, score_mod=both)
    np.testing.assert_allclose(
        attention(nnx.Rngs(0), in_features=12, num_heads=3, score_mod=double)(x, score_mod=shift), expected, atol=1e-6
    )


def test_arrays_of_a_stored_score_mod_are_state_of_the_layer():
    attn = attention(nnx.Rngs(0), in_features=12, num_heads=3, score_mod=HeadBias(jnp.array([0.1, -0.2, 0.3])))
    graphdef, state = nnx.split(attn)
    x = normal(1, 1, 5, 12)
    assert any(leaf.shape == (3,) for leaf in jax.tree.leaves(state))
    grads = jax.grad(lambda state: nnx.merge(graphdef, state)(x).sum(), allow_int=True)(state)
    assert any(leaf.shape == (3,) and (leaf != 0).all() for leaf in jax.tree.leaves(grads))


def test_cache_and_context_exclude_each_other():
    attn = attention(nnx.Rngs(0), in_features=12, num_heads=3)
    cache = attnax.init_kv_layer_cache(1, 3, 4, 5)
    x = normal(1, 1, 2, 12)
    with pytest.raises(ValueError, match="kv_cache is for self-attention"):
        attn(x, context=x, kv_cache=cache)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"x": jnp.ones((5, 12))}, r"x must be \(batch, length, 12\)"),
        ({"x": jnp.ones((1, 5, 11))}, r"x must be \(batch, length, 12\).*got x.shape=\(1, 5, 11\)"),
        ({"context": jnp.ones((2, 5, 12))}, r"context must be \(1, length, 12\); got context.shape=\(2, 5, 12\)"),
        (
            {"position_ids_q": np.arange(4)},
            r"position_ids_q must be integers of shape \(5,\) or \(1, 5\); got shape=\(4,\)",
        ),
        ({"position_ids_kv": np.ones(5)}, "dtype=float32"),
        ({"mask": np.ones((4, 5), bool)}, "flash_attention: mask must broadcast"),
        (
            {"mask": np.ones((5, 9), bool), "kv_cache": attnax.init_kv_layer_cache(1, 3, 4, 9)},
            r"with a cache: mask must broadcast to .*\(1, 3, 9, 9\); got mask.shape=\(1, 1, 5, 9\)",
        ),
    ],
)
def test_wrong_attention_input_is_refused_in_words(options, words):
    attn = attention(nnx.Rngs(0), in_features=12, num_heads=3)
    options = {"x": jnp.ones((1, 5, 12)), **options}
    with pytest.raises(ValueError, match=words):
        attn(options.pop("x"), **options)


@pytest.mark.parametrize("position", [0, 1, 255, 256, 4095, 131072, 2**31 - 1])
def test_rope_is_exact_at_any_position(position):
    expected = np.float64(position) * nn.rope_inv_freq(64)
    cos, sin = jax.jit(lambda p: nn.rope_cos_sin_from_positions(p, 64))(jnp.array([position]))
    assert np.abs(cos[0] - np.cos(expected)).max() <= 1e-6 and np.abs(sin[0] - np.sin(expected)).max() <= 1e-6


def test_rope_table_equals_rope_from_positions():
    for table, looked_up in zip(
        nn.rope_cos_sin_table(300, 6), nn.rope_cos_sin_from_positions(jnp.arange(300), 6), strict=True
    ):
        np.testing.assert_allclose(table, looked_up, atol=3e-7)


def test_rope_products_depend_on_the_distance_only():
    rope = nn.RotaryEmbedding(8)
    query, key = normal(1, 1, 1, 1, 8), normal(2, 1, 1, 1, 8)
    products = [
        jnp.vdot(rope(query, jnp.array([[start + 3]])), rope(key, jnp.array([[start]]))) for start in (0, 100, 100000)
    ]
    np.testing.assert_allclose(products, products[0], rtol=1e-5)


def test_rope_turns_split_halves():
    cos, sin = nn.rope_cos_sin_table(2, 4, base=100.0)
    turned = nn.apply_rope(jnp.array([[1.0, 0, 0, 0], [1.0, 0, 0, 0]]), cos, sin)
    np.testing.assert_allclose(turned, [[1, 0, 0, 0], [np.cos(1), 0, np.sin(1), 0]], atol=1e-7)


def test_rope_past_its_table_raises_and_is_computed_under_jit():
    rope = nn.RotaryEmbedding(4, max_positions=8)
    x = normal(1, 1, 1, 1, 4)
    with pytest.raises(ValueError, match="positions must be below 8; got position 9"):
        rope(x, jnp.array([[9]]))
    with pytest.raises(ValueError, match="positions must be below 8; got a sequence of 9"):
        rope(jnp.ones((1, 1, 9, 4)))
    np.testing.assert_allclose(
        jax.jit(rope)(x, jnp.array([[9]])), nn.RotaryEmbedding(4)(x, jnp.array([[9]])), atol=1e-6
    )


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "swiglu", "geglu"])
def test_feed_forward_is_its_formula(activation):
    ff = nn.FeedForward(nnx.Rngs(0), 6, 10, ff_activation=activation)
    x = normal(1, 2, 3, 6)
    act = {"relu": jax.nn.relu, "silu": jax.nn.silu, "swiglu": jax.nn.silu}.get(
        activation, lambda x: x * (1 + jax.lax.erf(x / np.sqrt(2))) / 2
    )
    up = x @ ff.up.kernel[...] + ff.up.bias[...].reshape(1, 1, -1)
    hidden = act(up)
    if activation in ("swiglu", "geglu"):
        hidden = act(x @ ff.gate.kernel[...] + ff.gate.bias[...].reshape(1, 1, -1)) * up
    np.testing.assert_allclose(ff(x), hidden @ ff.down.kernel[...], atol=1e-5)


def test_feed_forward_from_a_config():
    config = attnax.BlockConfig(d_model=6, num_heads=1, d_ff=10, dropout_rate=0.0, ff_activation="relu")
    x = normal(1, 2, 6)
    np.testing.assert_array_equal(
        nn.FeedForward(nnx.Rngs(0), config)(x), nn.FeedForward(nnx.Rngs(0), 6, 10, 0.0, "relu")(x)
    )


def test_layer_norm_survives_a_large_mean():
    norm = nn.create_norm("layer", 8, nnx.Rngs(0))
    x = normal(1, 3, 8)
    np.testing.assert_allclose(norm(x + 1000.0), norm(x), atol=2e-3)


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_residual_places_its_norms(placement):
    config = attnax.BlockConfig(d_model=6, num_heads=1, norm_placement=placement, norm_type="rms", dropout_rate=0.0)
    residual = Residual(nnx.Rngs(0), config)
    norm = lambda x: x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    x = normal(1, 2, 3, 6)
    out, extra = residual(x, lambda x: (3 * x + 1, "extra"))
    expected = {
        "pre": x + 3 * norm(x) + 1,
        "post": norm(x + 3 * x + 1),
        "sandwich": x + norm(3 * norm(x) + 1),
    }[placement]
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert extra == "extra"


def test_sinusoids_are_those_of_the_paper():
    table = nn.PositionalEncoding(7, 4)(jnp.zeros((1, 7, 4)))[0]
    for position, i in itertools.product(range(7), range(2)):
        angle = position / 10000 ** (2 * i / 4)
        np.testing.assert_allclose(table[position, 2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], atol=1e-6)


@pytest.mark.parametrize(
    "positions", [nn.PositionalEncoding(7, 4), nn.LearnedPositionalEmbedding(nnx.Rngs(0), num_positions=7, d_model=4)]
)
def test_position_vectors_start_anywhere_and_end_with_their_table(positions):
    x = jnp.zeros((1, 3, 4))
    whole = positions(jnp.zeros((1, 7, 4)))
    np.testing.assert_array_equal(positions(x, 2), whole[:, 2:5])
    np.testing.assert_array_equal(
        positions(x, position_ids=jnp.array([[6, 0, -1]]))[0, :2], whole[0, jnp.array([6, 0])]
    )
    with pytest.raises(ValueError, match="positions must be at least 0 and below 7; got 7"):
        positions(x, 5)
    assert jnp.isnan(jax.jit(lambda start: positions(x, start))(5)[0, 2]).all()


def test_ids_outside_the_vocabulary_raise_and_are_nan_under_jit():
    embed = nn.TokenEmbedding(nnx.Rngs(0), 5, 3)
    for bad in (5, -1):
        with pytest.raises(ValueError, match=f"token ids must be at least 0 and below 5; got {bad}"):
            embed(jnp.array([0, bad]))
        vectors = jax.jit(embed)(jnp.array([0, bad]))
        assert jnp.isfinite(vectors[0]).all() and jnp.isnan(vectors[1]).all()


def test_attend_gives_the_logits_of_tied_embeddings():
    embed = nn.TokenEmbedding(nnx.Rngs(0), 5, 3)
    x = normal(1, 2, 4, 3)
    np.testing.assert_allclose(embed.attend(x), x @ embed.embedding[...].T, atol=1e-6)


class TestDropout:
    def block(self, **fields):
        return nn.EncoderBlock(nnx.Rngs(0), d_model=12, num_heads=3, d_ff=16, dropout_rate=0.5, **fields)

    def test_off_at_first_on_in_training_and_explicit_beats_the_attribute(self):
        block, x = self.block(), normal(1, 1, 5, 12)
        still = block(x)
        np.testing.assert_array_equal(block(x), still)
        assert not jnp.allclose(block(x, deterministic=False), still)
        block.train()
        assert not jnp.allclose(block(x), still)
        np.testing.assert_array_equal(block(x, deterministic=True), still)
        block.eval()
        np.testing.assert_array_equal(block(x), still)
        assert not jnp.allclose(nnx.view(block, deterministic=False)(x), still)

    def test_explicit_rngs_beat_stored_ones(self):
        block, x = self.block(), normal(1, 1, 5, 12)
        one, two, other = (block(x, deterministic=False, rngs=nnx.Rngs(dropout=seed)) for seed in (1, 1, 2))
        np.testing.assert_array_equal(one, two)
        assert not jnp.allclose(one, other)

    def test_attention_weights_are_dropped(self):
        attn = attention(nnx.Rngs(0), in_features=12, num_heads=3, dropout_rate=0.5)
        x = normal(1, 1, 5, 12)
        assert not jnp.allclose(attn(x, deterministic=False), attn(x))

    def test_without_any_randomness_it_says_so(self):
        dropout = nn.Dropout(0.5)
        with pytest.raises(ValueError, match="dropout needs randomness; got dropout_rate=0.5"):
            dropout(jnp.ones(3), deterministic=False)
        assert nn.Dropout(0.0)(jnp.ones(3), deterministic=False).sum() == 3

    def test_rngs_without_a_stream_say_so(self):
        with pytest.raises(ValueError, match="must have a `dropout` stream"):
            nn.Dropout(0.5)(jnp.ones(3), deterministic=False, rngs=nnx.Rngs(params=0))

    def test_rate_zero_stores_no_streams(self):
        block = nn.EncoderBlock(nnx.Rngs(0), d_model=12, num_heads=3, d_ff=16, dropout_rate=0.0)
        assert not jax.tree.leaves(nnx.state(block, nnx.RngState))


@settings(deadline=None, max_examples=10, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2))
@pytest.mark.thorough
def test_reference_takes_any_sizes_and_leading_axes(seq_q, seq_kv, d_k, d_v, leading):
    lead = (2, 3)[:leading]
    params = reference.init_params(jax.random.key(0), d_model=6, num_heads=2, d_k=d_k, d_v=d_v)
    out = reference.multi_head_attention(
        params, jnp.ones((*lead, seq_q, 6)), jnp.ones((*lead, seq_kv, 6)), jnp.ones((*lead, seq_kv, 6))
    )
    assert out.shape == (*lead, seq_q, 6)


def test_reference_takes_another_activation():
    weights = reference.attention(jnp.ones((3, 4)), jnp.ones((5, 4)), jnp.ones((5, 2)), activation=lambda s: s * 0 + 1)
    np.testing.assert_allclose(weights, 5.0)


@pytest.mark.usefixtures("unchecked_shapes")
def test_reference_checks_shapes():
    with pytest.raises(
        ValueError, match=r"salience: query and key must agree in width; got shapes \(3, 4\) and \(5, 3\)"
    ):
        reference.attention(jnp.ones((3, 4)), jnp.ones((5, 3)), jnp.ones((5, 2)))
    with pytest.raises(ValueError, match="weigh: there must be one weight a value"):
        reference.attention(jnp.ones((3, 4)), jnp.ones((5, 4)), jnp.ones((6, 2)))
    with pytest.raises(ValueError, match="project: tokens and weight must agree"):
        reference.project(jnp.ones((3, 4)), jnp.ones((5, 2, 2)))


@pytest.mark.usefixtures("unchecked_shapes")
class TestConfig:
    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"num_head": 4}, "got num_head=4. Did you mean num_heads?"),
            ({"frobnicate": 4}, "The fields are attention_block_size, attention_dropout_rate"),
            (
                {"num_heads": 7},
                "d_model must be a multiple of num_heads unless head_dim is given; got d_model=512, num_heads=7",
            ),
            ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads; got num_heads=8, num_kv_heads=3"),
            ({"d_ff": 0}, "d_ff must be a whole number, at least 1; got d_ff=0"),
            ({"d_ff": 2.5}, "d_ff must be a whole number, at least 1; got d_ff=2.5"),
            ({"dropout_rate": 1.0}, "dropout_rate must be at least 0 and below 1; got dropout_rate=1.0"),
            ({"norm_type": "batch"}, "norm_type must be one of layer, rms; got norm_type='batch'"),
            ({"ff_activation": "tanh"}, "ff_activation must be one of gelu"),
            ({"norm_eps": 0.0}, "norm_eps must be above 0"),
            ({"rope_base": 1.0}, "rope_base must be above 1"),
            ({"rope_base": float("inf")}, "rope_base must be above 0"),
            ({"dropout_rate": "0.1"}, "dropout_rate must be at least 0 and below 1; got dropout_rate='0.1'"),
            ({"use_bias": ["quary"]}, "use_bias must be True, False, or names among query"),
            ({"use_rope": True, "head_dim": 3}, "rope needs an even number of features"),
            ({"use_rope": True, "pos_emb_type": "learned"}, "use_rope is another way to say pos_emb_type"),
            (
                {"use_pre_norm": True, "norm_placement": "post"},
                "another way to say norm_placement; give one of the two",
            ),
            ({"config": 3}, "config must be a BlockConfig; got int"),
        ],
    )
    def test_wrong_fields_are_refused_in_words(self, fields, words):
        with pytest.raises(ValueError, match=words.replace("?", r"\?").replace(".", r"\.")):
            nn.EncoderBlock(nnx.Rngs(0), **fields)

    def test_config_and_fields_exclude_each_other(self):
        with pytest.raises(ValueError, match="give a config or fields, not both"):
            nn.EncoderBlock(nnx.Rngs(0), attnax.BlockConfig(), d_model=3)

    def test_a_model_needs_a_model_config(self):
        with pytest.raises(ValueError, match="must be a TransformerConfig; got BlockConfig"):
            attnax.TransformerLM(nnx.Rngs(0), attnax.BlockConfig())
        with pytest.raises(ValueError, match="vocab_size must be given"):
            attnax.TransformerLM(nnx.Rngs(0), d_model=8)
        with pytest.raises(ValueError, match="rope_max_positions must be at least max_len; got rope_max_positions=8"):
            attnax.TransformerConfig(vocab_size=3, rope_max_positions=8, pos_emb_type="rope")
        with pytest.raises(ValueError, match="sinusoidal positions need an even d_model"):
            attnax.TransformerConfig(vocab_size=3, d_model=7, num_heads=1)

    def test_documented_flags_are_translated(self):
        assert attnax.BlockConfig(use_pre_norm=False).norm_placement == "post"
        assert attnax.BlockConfig(use_pre_norm=True, use_rope=True).pos_emb_type == "rope"

    def test_qkv_features_must_divide(self):
        with pytest.raises(
            ValueError, match="qkv_features must be a multiple of num_heads; got qkv_features=10, num_heads=3"
        ):
            attention(nnx.Rngs(0), in_features=12, num_heads=3, qkv_features=10)
