"""The options of attention, blocks and feed-forwards: each against its formula, dense and in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnax
from attnax import AttentionType, BlockConfig, MultiHeadAttention, masks, nn, standard_attention

BASE = {"d_model": 12, "num_heads": 6, "num_kv_heads": 2, "head_dim": 4, "dropout_rate": 0.0}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def randomized(module, seed=0):
    """The module with every parameter away from its initial value: biases, norms and sinks too."""
    params = nnx.state(module, nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    new = [leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    nnx.update(module, jax.tree.unflatten(tree, new))
    return module


def wide(array):
    return np.asarray(array, np.float64)


def project(layer, x):
    return wide(x) @ wide(layer.kernel[...]) + (0.0 if layer.bias is None else wide(layer.bias[...]))


def rms_norm(norm, x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * wide(norm.scale[...])


def rotate(x, frequencies, factor):
    """The first 2 * len(frequencies) features of (B, N, T, H), in pairs of halves, by position times frequency."""
    half = len(frequencies)
    angle = np.arange(x.shape[2])[:, None] * frequencies
    cos, sin = np.cos(angle) * factor, np.sin(angle) * factor
    first, second = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], axis=-1)


def expected_attention(attn, x, context=None):
    """Multi-head attention with all options, as one dense formula."""
    config, cross = attn.config, context is not None
    source = x if context is None else context

    def heads(layer, tokens, count, norm):
        projected = project(layer, tokens)
        if norm is not None:
            grouped = projected.reshape(*projected.shape[:2], -1, norm.num_features)
            projected = rms_norm(norm, grouped, config.norm_eps)
        return projected.reshape(*tokens.shape[:2], count, -1).swapaxes(1, 2)

    query = heads(attn.query, x, config.num_heads, attn.query_norm)
    key = heads(attn.key, source, config.kv_heads, attn.key_norm)
    value = heads(attn.value, source, config.kv_heads, None)
    if config.pos_emb_type == "rope":
        frequencies = nn.rope_inv_freq(config.rope_dim, config.rope_base, scaling=config.rope_scaling)
        factor = 1.0
        if config.rope_scaling is not None and config.rope_scaling.kind == "yarn":
            factor = 0.1 * np.log(config.rope_scaling.factor) + 1.0
        query, key = rotate(query, frequencies, factor), rotate(key, frequencies, factor)
    share = config.num_heads // config.kv_heads
    key, value = np.repeat(key, share, axis=1), np.repeat(value, share, axis=1)
    scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
    scores = np.einsum("bnth,bnsh->bnts", query, key) * scale
    if config.attention_soft_cap is not None:
        scores = config.attention_soft_cap * np.tanh(scores / config.attention_soft_cap)
    distance = np.arange(x.shape[1])[:, None] - np.arange(source.shape[1])[None, :]
    if config.pos_emb_type == "alibi" and not cross:
        slopes = wide(attnax.alibi_slopes(config.num_heads))
        scores = scores - slopes[:, None, None] * np.abs(distance)
    if config.attention_window is not None and not cross:
        scores = np.where(np.abs(distance) < config.attention_window, scores, -np.inf)
    if attn.sinks is not None:
        sinks = np.broadcast_to(wide(attn.sinks[...])[:, None, None], (*scores.shape[:3], 1))
        scores = np.concatenate([scores, sinks], axis=-1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True))[..., : source.shape[1]]
    merged = np.einsum("bnts,bnsh->bnth", weights, value).swapaxes(1, 2).reshape(*x.shape[:2], -1)
    return project(attn.out, merged), weights


OPTIONS = {
    "plain": {},
    "window": {"attention_window": 3},
    "soft cap": {"attention_soft_cap": 0.7},
    "scale": {"attention_scale": 0.11},
    "alibi": {"pos_emb_type": "alibi"},
    "sinks": {"attention_sinks": True},
    "norm of heads": {"qk_norm": "head"},
    "norm of projections": {"qk_norm": "projection"},
    "wide values": {"value_head_dim": 7},
    "biases by name": {"use_bias": ("query", "out")},
    "partial rope": {"pos_emb_type": "rope", "rope_fraction": 0.5, "rope_base": 100.0},
    "scaled rope": {
        "pos_emb_type": "rope",
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_len": 64},
    },
    "all together": {
        "attention_window": 4,
        "attention_soft_cap": 1.3,
        "attention_scale": 0.3,
        "attention_sinks": True,
        "qk_norm": "head",
        "value_head_dim": 5,
        "pos_emb_type": "rope",
        "rope_scaling": {"kind": "ntk", "factor": 3.0},
    },
}
call = nnx.jit(lambda attn, x, context: attn(x, context=context))


@pytest.mark.parametrize("cross", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["self", "cross"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_its_formula(name, cross):
    attn = randomized(MultiHeadAttention(nnx.Rngs(0), **(BASE | OPTIONS[name])))
    x, context = normal(1, 2, 7, 12), normal(2, 2, 5, 12) if cross else None
    expected, _ = expected_attention(attn, x, context)
    np.testing.assert_allclose(call(attn, x, context), expected, atol=2e-5)


@pytest.mark.parametrize("name", ["plain", "all together"])
def test_weights_are_those_of_the_formula(name):
    attn = randomized(MultiHeadAttention(nnx.Rngs(0), **(BASE | OPTIONS[name])))
    x = normal(1, 2, 7, 12)
    weights = nnx.jit(MultiHeadAttention.attention_weights)(attn, x)
    np.testing.assert_allclose(weights, expected_attention(attn, x)[1], atol=2e-6)


def test_weights_of_a_mask_and_a_mod_are_those_of_the_call():
    attn = MultiHeadAttention(nnx.Rngs(0), **BASE)
    weights = attn.attention_weights(normal(1, 1, 5, 12), mask=masks.causal(), score_mod=attnax.alibi_mod(6))
    assert (np.triu(weights[0, 0], 1) == 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)


SOFTMAX = [
    "flash",
    *(pytest.param(kind, marks=pytest.mark.thorough) for kind in ("standard", "memory_efficient", "pallas_flash")),
]


@pytest.mark.parametrize("kind", SOFTMAX)
@pytest.mark.parametrize("block_size", [None, 4])
def test_every_softmax_kernel_gives_the_same(kind, block_size):
    options = BASE | OPTIONS["all together"]
    x, cotangent = normal(1, 2, 7, 12), normal(2, 2, 7, 12)
    attn = randomized(MultiHeadAttention(nnx.Rngs(0), **options, attention_type=kind, attention_block_size=block_size))
    np.testing.assert_allclose(call(attn, x, None), expected_attention(attn, x)[0], atol=2e-5)
    if kind == "flash":
        graphdef, params, rest = nnx.split(attn, nnx.Param, ...)
        grads = jax.jit(jax.grad(lambda params: (nnx.merge(graphdef, params, rest)(x) * cotangent).sum()))(params)
        # A key's bias adds the same to all scores of a query, and the norm takes out its length: nothing remains zero.
        assert all((g != 0).any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("kind", ["linear", "lite"])
def test_kinds_without_a_softmax_call_their_kernels(kind):
    attn = MultiHeadAttention(nnx.Rngs(0), **BASE, attention_type=kind, linear_attention_chunk_size=3)
    x = normal(1, 2, 7, 12)

    @nnx.jit
    def by_hand_and_called(attn, mask):
        query, (key, value) = attn._heads(attn.query, x, 6, None), attn.keys_values(x)
        if kind == "linear":
            heads = attnax.linear_attention(query, key, value, causal=mask is not None)
        else:
            heads = attnax.lite_attention(query, key, value, attn.attention_fn.gate, mask=mask)
        return attn.out(heads.swapaxes(1, 2).reshape(2, 7, -1)), attn(x, mask=mask)

    for mask in (None, masks.causal()):
        np.testing.assert_allclose(*by_hand_and_called(attn, mask), atol=1e-5)


def test_the_gate_of_lite_attention_learns():
    attn = MultiHeadAttention(nnx.Rngs(0), **BASE, attention_type="lite")
    graphdef, params = nnx.split(attn)
    loss = lambda params: (nnx.merge(graphdef, params)(normal(1, 1, 5, 12)) ** 2).sum()
    grads = jax.jit(jax.grad(loss))(params)
    assert (nnx.to_pure_dict(grads)["attention_fn"]["gate"]["kernel"] != 0).all()


@pytest.mark.parametrize("kind", ["linear", "lite"])
def test_a_cache_of_keys_is_refused_where_it_is_not_read(kind):
    attn = MultiHeadAttention(nnx.Rngs(0), **BASE, attention_type=kind)
    with pytest.raises(NotImplementedError, match=f"{kind} attention does not read a KVLayerCache"):
        attn(normal(1, 1, 2, 12), kv_cache=attnax.init_kv_layer_cache(1, 2, 4, 5))


def test_layers_of_one_config_are_one_program():
    for kind in AttentionType:
        one, two = (
            nnx.split(MultiHeadAttention(nnx.Rngs(seed), **BASE, attention_type=kind, attention_block_size=4))[0]
            for seed in (0, 1)
        )
        assert one == two and hash(one) == hash(two)


def test_attention_dropout_drops_weights_and_nothing_else():
    """Values that are all the same: without dropout every mixture of them is that value."""
    attn = MultiHeadAttention(nnx.Rngs(0), **(BASE | {"attention_dropout_rate": 0.5, "use_bias": True}))
    attn.value.kernel[...] = jnp.zeros_like(attn.value.kernel[...])
    attn.value.bias[...] = jnp.ones_like(attn.value.bias[...])
    attn.out.kernel[...] = jnp.eye(24, 12)
    x = normal(1, 1, 101, 12)
    np.testing.assert_allclose(attn(x), 1.0, atol=1e-6)
    dropped = attn(x, deterministic=False, rngs=nnx.Rngs(dropout=3))
    assert 0.05 < float(dropped.std()) < 0.5 and abs(float(dropped.mean()) - 1.0) < 0.02
    np.testing.assert_array_equal(dropped, attn(x, deterministic=False, rngs=nnx.Rngs(dropout=3)))


def test_linear_attention_trains_under_the_default_dropout_of_a_config():
    block = nn.EncoderBlock(nnx.Rngs(0), BlockConfig(d_model=12, num_heads=3, d_ff=8, attention_type="linear"))
    out = nnx.jit(lambda block, x: block(x, deterministic=False))(block, normal(1, 1, 5, 12))
    assert jnp.isfinite(out).all()


def test_a_projected_context_stands_for_the_context():
    attn = randomized(MultiHeadAttention(nnx.Rngs(0), **BASE, use_rope=True, context_features=5))
    x, context = normal(1, 2, 7, 12), normal(2, 2, 3, 5)
    positions = np.array([2, 5, 6])
    expected = nnx.jit(lambda attn: attn(x, context=context, position_ids_kv=positions))(attn)
    projected = nnx.jit(lambda attn: attn.keys_values(context, positions))(attn)
    np.testing.assert_array_equal(call(attn, x, projected), expected)


def test_objects_may_stand_for_the_options():
    norm = nnx.RMSNorm(4, rngs=nnx.Rngs(0))
    objects = MultiHeadAttention(
        nnx.Rngs(0), **BASE, rope=nn.RotaryEmbedding(4), query_norm=norm, key_norm=nnx.RMSNorm(4, rngs=nnx.Rngs(0))
    )
    options = MultiHeadAttention(nnx.Rngs(0), **BASE, use_rope=True, qk_norm="head")
    x = normal(1, 1, 5, 12)
    np.testing.assert_array_equal(objects(x), options(x))


def test_sinks_need_a_kernel_that_gives_the_log_sum():
    def plain(query, key, value, *, mask=None, score_mod=None, dropout_rng=None, dropout_rate=0.0, deterministic=True):
        return standard_attention(query, key, value)

    for options in ({"attention_fn": plain}, {"attention_type": "lite"}):
        with pytest.raises(ValueError, match="attention_sinks needs an attention function with return_lse"):
            MultiHeadAttention(nnx.Rngs(0), **BASE, attention_sinks=True, **options)
    with pytest.raises(ValueError, match="attention_scale needs an attention function with scale"):
        MultiHeadAttention(nnx.Rngs(0), **BASE, attention_scale=0.3, attention_fn=plain)


@pytest.mark.parametrize("kind", ["linear", "lite"])
@pytest.mark.parametrize(
    "fields",
    [{"attention_scale": 0.3}, {"attention_soft_cap": 3.0}, {"attention_window": 3}, {"pos_emb_type": "alibi"}],
)
def test_options_of_scores_are_refused_where_there_are_none(kind, fields):
    with pytest.raises(ValueError, match=f"{kind} attention has no"):
        MultiHeadAttention(nnx.Rngs(0), **BASE, attention_type=kind, **fields)


def test_a_scale_is_as_exact_as_the_kernels_in_low_precision():
    """It is applied to float32 scores; a query rescaled in bfloat16 would be rounded twice."""
    attn = MultiHeadAttention(nnx.Rngs(0), **(BASE | {"attention_scale": 0.55, "dtype": "bfloat16"}))
    x = normal(1, 1, 7, 12).astype(jnp.bfloat16)
    query, (key, value) = attn._heads(attn.query, x, 6, None), attn.keys_values(x)
    heads = standard_attention(query, key, value, scale=0.55)
    np.testing.assert_array_equal(attn(x), attn.out(heads.swapaxes(1, 2).reshape(1, 7, -1)))


def scaled_by(slopes):
    return lambda scores, b, h, q, kv: scores * slopes[h]


def test_a_stored_score_mod_may_not_hide_arrays():
    slope = nnx.Param(jnp.ones(6))
    for held in (slope, jnp.ones(6), [slope]):
        with pytest.raises(ValueError, match="must not close over arrays, which get no gradient"):
            MultiHeadAttention(nnx.Rngs(0), **BASE, score_mod=scaled_by(held))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_gives_nothing(shape):
    attn = MultiHeadAttention(nnx.Rngs(0), **BASE, qk_norm="head")
    assert attn(jnp.zeros((*shape, 12))).shape == (*shape, 12)
    assert (np.asarray(attn(jnp.ones((2, 3, 12)), context=jnp.zeros((2, 0, 12)))) == 0).all()  # and no bias yet


def test_a_config_and_sizes_exclude_each_other():
    with pytest.raises(ValueError, match="a config says the sizes; got it with in_features or qkv_features"):
        MultiHeadAttention(nnx.Rngs(0), BlockConfig(**BASE), qkv_features=12)
    attn = MultiHeadAttention(nnx.Rngs(0), **BASE)
    x = normal(1, 1, 3, 12)
    with pytest.raises(ValueError, match="got position_ids_kv with KeysValues"):
        attn(x, context=attn.keys_values(x), position_ids_kv=np.arange(3))


ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(__import__("math").erf)(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


@pytest.mark.parametrize("name", [*ACTIVATIONS, "swish", *GATED, "swiglu_clipped"])
def test_every_activation_is_its_formula(name):
    layer = randomized(nn.FeedForward(nnx.Rngs(0), 5, 7, ff_activation=name))
    x = normal(1, 3, 5)
    hidden = project(layer.up, x)
    if name == "swiglu_clipped":
        x = 6 * x  # far enough to be clipped
        hidden, gate = project(layer.up, x), np.minimum(project(layer.gate, x), 7)
        assert gate.max() == 7 and hidden.max() > 7 and hidden.min() < -7
        hidden = gate / (1 + np.exp(-1.702 * gate)) * (np.clip(hidden, -7, 7) + 1)
    elif name in GATED:
        hidden = ACTIVATIONS[GATED[name]](project(layer.gate, x)) * hidden
    else:
        hidden = ACTIVATIONS["silu" if name == "swish" else name](hidden)
    expected = hidden @ wide(layer.down.kernel[...]) + wide(layer.down.bias[...])
    np.testing.assert_allclose(nnx.jit(nn.FeedForward.__call__)(layer, x), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_offset_is_added_to_the_scales_of_rms_norms(dtype):
    fields = {"d_model": 12, "num_heads": 3, "norm_type": "rms", "norm_offset": 1.0, "dtype": dtype}
    block = nn.EncoderBlock(nnx.Rngs(0), **fields, param_dtype=dtype, qk_norm="head")
    for norm in (block.around_attention.norm_in, block.attention.query_norm):
        assert norm.scale[...].dtype == dtype and (norm.scale[...] == 0).all()
        norm.scale[...] = jnp.asarray(normal(1, *norm.scale.shape) / 100, dtype)
        x = jnp.asarray(normal(2, 5, norm.num_features), dtype)
        y = wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-6) * (1 + wide(norm.scale[...]))
        assert norm(x).dtype == dtype  # 1 + scale has not been rounded to it
        np.testing.assert_allclose(wide(norm(x)), y, rtol=1e-6 if dtype == "float32" else 2**-8, atol=1e-6)


def sublayers(block):
    return block.attention, block.feed_forward


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich", "branch"])
def test_norms_stand_where_the_config_says(placement):
    config = BlockConfig(
        d_model=12, num_heads=3, d_ff=8, dropout_rate=0.0, norm_placement=placement, residual_scale=0.7
    )
    block = randomized(nn.EncoderBlock(nnx.Rngs(0), config))

    @nnx.jit
    def by_hand_and_called(block, x):
        expected = x
        around = block.around_attention, block.around_feed_forward
        for residual, sublayer in zip(around, sublayers(block), strict=True):
            if placement == "pre":
                expected = expected + 0.7 * sublayer(residual.norm_in(expected))
            elif placement == "post":
                expected = residual.norm_sum(expected + 0.7 * sublayer(expected))
            elif placement == "sandwich":
                expected = expected + 0.7 * residual.norm_branch(sublayer(residual.norm_in(expected)))
            else:
                expected = expected + 0.7 * residual.norm_branch(sublayer(expected))
        return expected, block(x)

    np.testing.assert_allclose(*by_hand_and_called(block, normal(1, 1, 5, 12)), atol=1e-5)


def test_parallel_sublayers_read_the_same_stream():
    config = BlockConfig(d_model=12, num_heads=3, d_ff=8, dropout_rate=0.0, parallel_residual=True)
    block = randomized(nn.EncoderBlock(nnx.Rngs(0), config))
    x = normal(1, 1, 5, 12)
    attend, feed_forward = sublayers(block)
    expected = x + attend(block.around_attention.norm_in(x)) + feed_forward(block.around_feed_forward.norm_in(x))
    np.testing.assert_allclose(nnx.jit(nn.EncoderBlock.__call__)(block, x), expected, atol=1e-5)


def test_a_decoder_block_is_its_three_sublayers():
    config = BlockConfig(d_model=12, num_heads=3, d_ff=8, dropout_rate=0.0, use_bias=False, pos_emb_type="rope")
    block = randomized(nn.DecoderBlock(nnx.Rngs(0), config, encoder_features=7))
    x, encoded = normal(1, 2, 5, 12), normal(2, 2, 3, 7)
    seen = np.array([[True, True, False], [True, True, True]])
    options = {"self_mask": masks.causal(), "cross_mask": masks.padding(seen)}

    @nnx.jit
    def by_hand(block, x):
        out = x + block.attention(block.around_attention.norm_in(x), mask=masks.causal())
        out = out + block.cross_attention(
            block.around_cross_attention.norm_in(out), context=encoded, mask=masks.padding(seen)
        )
        return out + block.feed_forward(block.around_feed_forward.norm_in(out))

    @nnx.jit
    def run(block, x, encoded, **more):
        return block(x, encoder_output=encoded, **options, **more)

    expected = by_hand(block, x)
    np.testing.assert_allclose(run(block, x, encoded), expected, atol=1e-5)
    cache, parts = attnax.init_kv_layer_cache(2, 3, 4, 6), []
    for token in range(5):  # rotated by the cache's positions, in cross-attention too
        part, cache = run(block, x[:, token : token + 1], encoded, self_attn_kv_cache=cache)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-5)
    contexts = block.cross_attention.keys_values(encoded)
    np.testing.assert_allclose(run(block, x, contexts), expected, atol=1e-5)
    cache = attnax.init_kv_layer_cache(2, 3, 4, 6)
    parts = []
    for chunk in (slice(2), slice(2, 4)):
        part, cache = run(
            block, x[:, chunk], encoded, self_attn_kv_cache=cache, position_ids_cross_q=np.arange(5)[chunk]
        )
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected[:, :4], atol=1e-5)


def test_what_a_decoder_block_cannot_do_is_said():
    with pytest.raises(ValueError, match="cross-attention reads what self-attention wrote"):
        nn.DecoderBlock(nnx.Rngs(0), d_model=12, num_heads=3, parallel_residual=True)


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("lecun_normal", 400**-0.5),
        ("he_normal", (2 / 400) ** 0.5),
        ("xavier_normal", (2 / 700) ** 0.5),
        ("xavier_uniform", (2 / 700) ** 0.5),
        ("normal", 0.013),
    ],
)
def test_initial_weights_have_the_size_that_their_name_says(name, std):
    config = BlockConfig(d_model=400, num_heads=1, d_ff=300, kernel_init=name, init_std=0.013)
    kernel = nn.FeedForward(nnx.Rngs(0), config).up.kernel[...]
    assert abs(float(kernel.std()) / std - 1) < 0.01
    uniform = float(jnp.abs(kernel).max()) < std * 3**0.5 * 1.001
    assert uniform == (name == "xavier_uniform")


def test_depth_scales_what_is_written_into_the_stream():
    config = attnax.TransformerConfig(vocab_size=7, num_layers=8, d_model=64, num_heads=1, d_ff=64)
    for residual_init, expected in (("depth", 0.25), ("none", 1.0)):
        block = nn.EncoderBlock(nnx.Rngs(0), dataclasses.replace(config, residual_init=residual_init))
        for layer in (block.attention.out, block.feed_forward.down):
            assert abs(float(layer.kernel[...].std()) * 8 / expected - 1) < 0.05
