"""Layers: against the reference, exact positions, and wrong input in words."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build

import attnax
from attnax import masks, nn, reference
from attnax.nn import linear
from attnax.nn.blocks import Residual

attention = nn.MultiHeadAttention


def normal(seed, *shape):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def ones(*shape):
    return jax.device_put(np.ones(shape, np.float32))


def make_attention(**fields):
    return build(lambda rngs: attention(rngs, **({"in_features": 12, "num_heads": 3} | fields)))


apply = nnx.jit(lambda module, *arguments: module(*arguments))


def reference_params(attn, d_model, num_heads, num_kv_heads, head_dim):
    """The layer's weights as the reference takes them, with each shared key head written out."""
    share = num_heads // num_kv_heads
    query, key, value, out = (np.asarray(layer.kernel[...]) for layer in (attn.query, attn.key, attn.value, attn.out))
    key, value = (np.repeat(kernel.reshape(d_model, num_kv_heads, head_dim), share, axis=1) for kernel in (key, value))
    kernels = query.reshape(d_model, num_heads, head_dim), key, value, out.reshape(num_heads, head_dim, -1)
    return reference.AttentionParams(*map(jnp.asarray, kernels))


@pytest.mark.parametrize("cross", [False, pytest.param(True, marks=pytest.mark.contract)])
def test_attention_equals_the_reference(cross):
    attns = {
        count: make_attention(num_heads=6, in_features=11, num_kv_heads=count, qkv_features=18, use_bias=False)
        for count in (1, 2, 6)
    }
    params = {count: reference_params(attn, 11, 6, count, 3) for count, attn in attns.items()}
    x, context = normal(1, 2, 5, 11), normal(2, 2, 7, 11) if cross else None
    source = x if context is None else context
    mask = np.arange(source.shape[1]) != 2
    whole = jax.device_put(np.broadcast_to(mask, (2, 5, source.shape[1])))

    @nnx.jit
    def run(attns, params):
        return {
            count: (
                attn(x, context=context, mask=mask),
                reference.multi_head_attention(params[count], x, source, source, whole),
            )
            for count, attn in attns.items()
        }

    for count, pair in run(attns, params).items():
        np.testing.assert_allclose(*pair, atol=2e-6, err_msg=f"num_kv_heads={count}")


def assert_same_module(one, two):
    """Of equal structure, options and parameter shapes: with equal randomness, equal modules."""
    (graphdef, state), (other_graphdef, other_state) = (nnx.split(nnx.eval_shape(make)) for make in (one, two))
    assert graphdef == other_graphdef
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, other_state)


def test_attention_from_a_config_and_from_keywords_is_the_same():
    config = attnax.BlockConfig(d_model=12, num_heads=3, num_kv_heads=1, dropout_rate=0.0)
    assert_same_module(
        lambda: attention(nnx.Rngs(0), config),
        lambda: attention(nnx.Rngs(0), in_features=12, num_heads=3, num_kv_heads=1, dropout_rate=0.0),
    )


def test_any_attention_function_obeying_the_protocol_fits():
    seen = {}

    def mean_values(
        query, key, value, *, mask=None, score_mod=None, dropout_rng=None, dropout_rate=0.0, deterministic=True
    ):
        seen.update(mask=mask, shape=query.shape, score_mod=score_mod)
        return jnp.broadcast_to(value.mean(2, keepdims=True), query.shape)

    attn = make_attention(attention_fn=mean_values)
    out = jax.eval_shape(lambda x: attn(x, mask=masks.causal()), normal(1, 2, 5, 12))
    assert out.shape == (2, 5, 12) and seen["shape"] == (2, 3, 5, 4)
    assert seen["mask"].shape == (1, 1, 5, 5) and seen["mask"].dtype == bool


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
    plain, doubling = make_attention(), make_attention(score_mod=double)
    run = nnx.jit(lambda plain, doubling: (plain(x, score_mod=both), doubling(x, score_mod=shift)))
    np.testing.assert_allclose(*run(plain, doubling), atol=1e-6)


def test_arrays_of_a_stored_score_mod_are_state_of_the_layer():
    bias = jax.device_put(np.array([0.1, -0.2, 0.3], np.float32))
    graphdef, state = nnx.split(attention(nnx.Rngs(0), in_features=12, num_heads=3, score_mod=HeadBias(bias)))
    x = normal(1, 1, 5, 12)
    assert any(leaf.shape == (3,) for leaf in jax.tree.leaves(state))
    grads = jax.jit(jax.grad(lambda state: nnx.merge(graphdef, state)(x).sum(), allow_int=True))(state)
    assert any(leaf.shape == (3,) and (np.asarray(leaf) != 0).all() for leaf in jax.tree.leaves(grads))


def test_cache_and_context_exclude_each_other():
    attn = make_attention()
    cache = attnax.init_kv_layer_cache(1, 3, 4, 5)
    x = normal(1, 1, 2, 12)
    with pytest.raises(ValueError, match="kv_cache is for self-attention"):
        attn(x, context=x, kv_cache=cache)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"x": np.ones((5, 12))}, r"x must be \(batch, length, 12\)"),
        ({"x": np.ones((1, 5, 11))}, r"x must be \(batch, length, 12\).*got x.shape=\(1, 5, 11\)"),
        ({"context": np.ones((2, 5, 12))}, r"context must be \(1, length, 12\); got context.shape=\(2, 5, 12\)"),
        (
            {"position_ids_q": np.arange(4)},
            r"position_ids_q must be integers of shape \(5,\) or \(1, 5\); got shape=\(4,\)",
        ),
        ({"position_ids_kv": np.ones(5)}, "dtype=float32"),
        ({"mask": np.ones((4, 5), bool)}, "flash_attention: mask must broadcast"),
        (
            {"mask": np.ones((4, 9), bool), "slots": 9},
            r"with a cache: mask must broadcast to .*\(1, 3, 9, 9\); got mask.shape=\(1, 1, 4, 9\)",
        ),
    ],
)
def test_wrong_attention_input_is_refused_in_words(options, words):
    attn, options = make_attention(), {"x": ones(1, 5, 12), **options}
    if "slots" in options:
        options["kv_cache"] = attnax.init_kv_layer_cache(1, 3, 4, options.pop("slots"))
    with pytest.raises(ValueError, match=words):
        attn(options.pop("x"), **options)


def test_rope_is_exact_at_any_position():
    positions = np.array([0, 1, 255, 256, 4095, 131072, 2**31 - 1], np.int32)
    expected = positions[:, None].astype(np.float64) * nn.rope_inv_freq(64)
    cos, sin = jax.jit(lambda p: nn.rope_cos_sin_from_positions(p, 64))(positions)
    assert np.abs(cos - np.cos(expected)).max() <= 1e-6 and np.abs(sin - np.sin(expected)).max() <= 1e-6


def test_rope_table_equals_rope_from_positions():
    for table, looked_up in zip(
        nn.rope_cos_sin_table(300, 6), nn.rope_cos_sin_from_positions(np.arange(300), 6), strict=True
    ):
        np.testing.assert_allclose(table, looked_up, atol=3e-7)


def test_rope_products_depend_on_the_distance_only():
    rope = nn.RotaryEmbedding(8)
    query, key = (np.repeat(normal(seed, 1, 1, 1, 8), 3, axis=2) for seed in (1, 2))
    start = np.array([[0, 100, 100000]])
    rotated = jax.jit(lambda query, key: (rope(query, start + 3), rope(key, start)))(query, key)
    products = np.einsum("bnth,bnth->t", *map(np.asarray, rotated))
    np.testing.assert_allclose(products, products[0].repeat(3), rtol=1e-5)


def test_rope_turns_split_halves():
    cos, sin = nn.rope_cos_sin_table(2, 4, base=100.0)
    turned = jax.jit(nn.apply_rope)(np.array([[1, 0, 0, 0], [1, 0, 0, 0]], np.float32), cos, sin)
    np.testing.assert_allclose(turned, [[1, 0, 0, 0], [np.cos(1), 0, np.sin(1), 0]], atol=1e-7)


def test_rope_past_its_table_raises_and_is_computed_under_jit():
    rope = nn.RotaryEmbedding(4, max_positions=8)
    x = normal(1, 1, 1, 1, 4)
    with pytest.raises(ValueError, match="positions must be below 8; got position 9"):
        rope(x, np.array([[9]]))
    with pytest.raises(ValueError, match="positions must be below 8; got a sequence of 9"):
        rope(ones(1, 1, 9, 4))
    both = jax.jit(lambda positions: (rope(x, positions), nn.RotaryEmbedding(4)(x, positions)))
    np.testing.assert_allclose(*both(np.array([[9]])), atol=1e-6)


def test_sinusoids_and_tied_logits_of_float64_are_as_exact_as_float64():
    with jax.enable_x64(True):
        x = jax.device_put(np.random.default_rng(0).normal(size=(1, 7, 4)))
        angles = np.arange(7)[:, None] * 10000.0 ** -np.array([0, 0.5])
        sinusoids = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(7, 4)
        np.testing.assert_allclose(nn.PositionalEncoding(7, 4)(x), x + sinusoids[None], atol=1e-12)
        tokens = build(lambda rngs: nn.TokenEmbedding(rngs, 5, 4, param_dtype="float64"))
        np.testing.assert_allclose(tokens.attend(x), np.asarray(x) @ np.asarray(tokens.embedding).T, atol=1e-12)


def test_feed_forward_from_a_config():
    config = attnax.BlockConfig(d_model=6, num_heads=1, d_ff=10, dropout_rate=0.0, ff_activation="relu")
    one, two = (
        build(make)
        for make in (lambda rngs: nn.FeedForward(rngs, config), lambda rngs: nn.FeedForward(rngs, 6, 10, 0.0, "relu"))
    )
    np.testing.assert_array_equal(*nnx.jit(lambda one, two, x: (one(x), two(x)))(one, two, normal(1, 2, 6)))


def test_layer_norm_survives_a_large_mean():
    norm = build(lambda rngs: nn.create_norm("layer", 8, rngs))
    x = np.asarray(normal(1, 3, 8))
    np.testing.assert_allclose(apply(norm, x + 1000), apply(norm, x), atol=2e-3)


def test_residual_places_its_norms():
    fields = {"d_model": 6, "num_heads": 1, "norm_type": "rms", "dropout_rate": 0.0}
    placements = ("pre", "post", "sandwich", "branch")
    residuals = {
        name: build(lambda rngs, name=name: Residual(rngs, attnax.BlockConfig(norm_placement=name, **fields)))
        for name in placements
    }
    x = normal(1, 2, 3, 6)
    run = nnx.jit(
        lambda residuals: {name: residual(x, lambda x: (3 * x + 1, 7)) for name, residual in residuals.items()}
    )
    results, x = run(residuals), np.asarray(x)
    norm = lambda x, norm: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(norm.scale[...])
    for name, residual in residuals.items():
        into, branch, total = residual.norm_in, residual.norm_branch, residual.norm_sum
        if name == "pre":
            expected = x + 3 * norm(x, into) + 1
        elif name == "post":
            expected = norm(x + 3 * x + 1, total)
        elif name == "sandwich":
            expected = x + norm(3 * norm(x, into) + 1, branch)
        else:
            expected = x + norm(3 * x + 1, branch)
        out, extra = results[name]
        np.testing.assert_allclose(out, expected, atol=1e-5, err_msg=name)
        assert int(extra) == 7


def test_sinusoids_are_those_of_the_paper():
    table = np.asarray(apply(nn.PositionalEncoding(7, 4), np.zeros((1, 7, 4), np.float32)))[0]
    for position, i in itertools.product(range(7), range(2)):
        angle = position / 10000 ** (2 * i / 4)
        np.testing.assert_allclose(table[position, 2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], atol=1e-6)


@pytest.mark.parametrize("kind", ["sinusoids", "learned"])
def test_position_vectors_start_anywhere_and_end_with_their_table(kind):
    learned = build(lambda rngs: nn.LearnedPositionalEmbedding(rngs, num_positions=7, d_model=4))
    positions = nn.PositionalEncoding(7, 4) if kind == "sinusoids" else learned
    x = jax.device_put(np.zeros((1, 3, 4), np.float32))

    @nnx.jit
    def run(positions, start):
        ids = np.array([[6, 0, -1]])
        whole = positions(jnp.zeros((1, 7, 4)))
        return whole, positions(x, 2), positions(x, start), positions(x, position_ids=ids)

    whole, fixed, traced, given = (np.asarray(out) for out in run(positions, 2))
    np.testing.assert_array_equal(fixed, whole[:, 2:5])
    np.testing.assert_array_equal(traced, whole[:, 2:5])
    np.testing.assert_array_equal(given[0, :2], whole[0, [6, 0]])
    assert np.isnan(run(positions, 5)[2])[0, 2].all()
    with pytest.raises(ValueError, match="positions must be at least 0 and below 7; got 7"):
        positions(x, 5)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("kind", ["PositionalEncoding", "LearnedPositionalEmbedding"])
@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((3, 4), {}, r"x must be of shape \(batch, length, 4\); got x.shape=\(3, 4\)"),
        ((1, 2, 3, 4), {}, r"x must be .*; got x.shape=\(1, 2, 3, 4\)"),
        ((2, 3, 5), {}, r"x must be .*; got x.shape=\(2, 3, 5\)"),
        ((1, 2, 3, 4), {"position_ids": np.zeros((1, 3), int)}, "x must be "),
        ((2, 3, 4), {"start": np.zeros(1, int)}, r"start must be integers of shape \(\); got start.shape=\(1,\)"),
        ((2, 3, 4), {"start": np.zeros(3, int)}, r"start must be .*; got start.shape=\(3,\)"),
        ((2, 3, 4), {"start": 1.0}, "start must be integers .*, dtype=float"),
        ((2, 3, 4), {"position_ids": np.zeros((1, 1, 3), int)}, r"position_ids must be .* \(1, 3\) or \(2, 3\); got"),
        ((2, 3, 4), {"position_ids": np.zeros((1, 2), int)}, "position_ids must be integers of shape"),
    ],
)
def test_position_vectors_refuse_other_shapes_in_words(kind, shape, options, words):
    positions = nn.PositionalEncoding(7, 4)
    if kind == "LearnedPositionalEmbedding":
        positions = build(lambda rngs: nn.LearnedPositionalEmbedding(rngs, num_positions=7, d_model=4))
    with pytest.raises(ValueError, match=f"{kind}: {words}"):
        positions(np.zeros(shape, np.float32), **options)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((3,), {}, r"input_ids must be of shape \(batch, length\); got input_ids.shape=\(3,\)"),
        ((1, 2, 3), {}, r"input_ids must be .*; got input_ids.shape=\(1, 2, 3\)"),
        (
            (2, 3),
            {"position_ids": np.zeros((1, 2, 3), int)},
            r"position_ids must be of shape \(1, 3\) or \(2, 3\); got",
        ),
        ((2, 3), {"token_type_ids": np.zeros((1, 2, 3), int)}, r"token_type_ids must be of shape \(2, 3\); got"),
        ((2, 3), {"token_type_ids": np.zeros((1, 3), int)}, r"token_type_ids must be of shape \(2, 3\); got"),
    ],
)
def test_embeddings_of_a_model_refuse_other_shapes_in_words(shape, options, words):
    config = attnax.TransformerConfig(vocab_size=5, d_model=4, num_heads=1, pos_emb_type="rope", num_token_types=2)
    embed = nnx.eval_shape(lambda: nn.TransformerEmbedding(nnx.Rngs(0), config))
    with pytest.raises(ValueError, match=f"TransformerEmbedding: {words}"):
        embed(np.zeros(shape, int), **options)


def test_embeddings_of_a_model_are_scaled_tokens_with_types_and_places_in_the_dtype():
    config = attnax.TransformerConfig(
        vocab_size=5,
        d_model=4,
        num_heads=1,
        max_len=7,
        pos_emb_type="learned",
        num_token_types=2,
        embedding_scale=3.5,
        dropout_rate=0.0,
        dtype="bfloat16",
        param_dtype="float16",
    )
    ids, types = np.array([[3, 0, 4]]), np.array([[1, 0, 1]])
    embed = build(lambda rngs: nn.TransformerEmbedding(rngs, config))
    tables = embed.tokens.embedding, embed.types.embedding, embed.positions.embedding
    assert {table.dtype for table in tables} == {np.dtype("float16")}
    tokens, of_types, places = (np.asarray(table[...], np.float32) for table in tables)
    run = nnx.jit(lambda embed: (embed(ids, token_type_ids=types), embed(ids)))
    for out, kinds in zip(run(embed), (types, np.zeros_like(types)), strict=True):
        assert out.dtype == jnp.bfloat16
        want = 3.5 * tokens[ids] + of_types[kinds] + places[:3]
        np.testing.assert_allclose(out.astype(np.float32), want, rtol=0.02, atol=0.05)


def bfloat16_layers():
    """Each layer with the arguments of a call."""
    dtypes = {"dtype": "bfloat16", "param_dtype": "float16"}
    block = {"d_model": 12, "num_heads": 3, "d_ff": 8, **dtypes}
    x, ids = jax.ShapeDtypeStruct((1, 4, 12), jnp.float32), np.zeros((1, 4), int)
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 3}
    return {
        "attention": (lambda rngs: attention(rngs, in_features=12, num_heads=3, qk_norm="head", **dtypes), x),
        "feed-forward": (lambda rngs: nn.FeedForward(rngs, 12, 8, ff_activation="swiglu", **dtypes), x),
        "experts": (lambda rngs: nn.MixtureOfExperts(rngs, d_model=12, d_ff=8, num_experts=3, top_k=2, **dtypes), x),
        "encoder block": (lambda rngs: nn.EncoderBlock(rngs, norm_type="rms", **block), x.update(dtype="bfloat16")),
        "tokens": (lambda rngs: nn.TokenEmbedding(rngs, 5, 12, **dtypes), ids),
        "patches": (lambda rngs: nn.PatchEmbedding(rngs, d_model=12, **sizes, **dtypes), image),
    }


@pytest.mark.parametrize("name", bfloat16_layers())
def test_layers_compute_in_their_dtype_with_parameters_of_theirs(name):
    make, given = bfloat16_layers()[name]
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(module, nnx.Param))} == {np.dtype("float16")}
    out = jax.eval_shape(lambda state, given: nnx.merge(graphdef, state)(given), state, given)
    assert jax.tree.leaves(out)[0].dtype == jnp.bfloat16


def test_ids_outside_the_vocabulary_raise_and_are_nan_under_jit():
    embed = build(lambda rngs: nn.TokenEmbedding(rngs, 5, 3))
    for bad in (5, -1):
        with pytest.raises(ValueError, match=f"token ids must be at least 0 and below 5; got {bad}"):
            embed(np.array([0, bad]))
        vectors = np.asarray(apply(embed, np.array([0, bad])))
        assert np.isfinite(vectors[0]).all() and np.isnan(vectors[1]).all()


@pytest.mark.usefixtures("unchecked_shapes")
def test_embeddings_take_lists_of_ids_as_models_do():
    config = attnax.TransformerConfig(vocab_size=5, d_model=6, num_heads=2, num_layers=1, d_ff=7, num_token_types=2)
    whole, table = build(lambda rngs: nn.TransformerEmbedding(rngs, config)), [[0, 4, 3], [1, 2, 0]]
    assert jax.eval_shape(lambda: whole(table, token_type_ids=[[0, 1, 1], [0, 0, 1]])).shape == (2, 3, 6)
    assert jax.eval_shape(lambda: whole.tokens(table)).shape == (2, 3, 6)
    whole.tokens.check(table)
    with pytest.raises(ValueError, match="token ids must be at least 0 and below 5; got 7"):
        whole([[0, 7]])
    with pytest.raises(ValueError, match="token ids must be integers; got dtype=float32"):
        whole.tokens([0.5])


def test_attend_gives_the_logits_of_tied_embeddings():
    embed = build(lambda rngs: nn.TokenEmbedding(rngs, 5, 3))
    x = normal(1, 2, 4, 3)
    logits = nnx.jit(lambda embed: embed.attend(x))(embed)
    np.testing.assert_allclose(logits, np.asarray(x) @ np.asarray(embed.embedding[...]).T, atol=1e-6)


def test_the_gradient_of_a_tall_matrix_is_a_product_with_the_wider_factor_on_the_right():
    x, kernel = normal(0, 11, 7), normal(1, 7, 3)
    dims = (((1,), (0,)), ((), ()))

    def total(kernel, product):
        return jnp.square(product(x, kernel, dims)).sum()

    product = linear.Product((None, None), is_tall=True)
    gradient = jax.jit(jax.grad(lambda kernel: total(kernel, product)))
    np.testing.assert_allclose(gradient(kernel), 2 * x.T @ (x @ kernel), rtol=1e-5)
    assert re.search(r"\[3,7\]\S* dot\(|f32\[3,7\]\S* \S*fusion\(", gradient.lower(kernel).compile().as_text())
    tangent = jax.jvp(lambda kernel: product(x, kernel, dims), (kernel,), (2 * kernel,))[1]
    np.testing.assert_allclose(tangent, 2 * x @ kernel, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "rows", "read"), [("float32", 1, 1), ("bfloat16", 1, 2), ("bfloat16", 2, 2)])
def test_one_row_in_bfloat16_gets_a_row_of_zeros_on_a_cpu(dtype, rows, read):
    """The same numbers; XLA is slow for one row."""
    config = attnax.TransformerConfig(
        vocab_size=5, d_model=8, num_heads=1, use_bias=False, dtype=dtype, param_dtype=dtype
    )
    layer = build(lambda rngs: linear.Linear(rngs, config, 8, 3, bias="attn_bias", axes=("embed", "mlp")))
    embed = build(lambda rngs: nn.TokenEmbedding(rngs, 5, 8, param_dtype=dtype))
    x = normal(0, 1, rows, 8).astype(dtype)
    for call, kernel in ((layer, layer.kernel[...]), (embed.attend, embed.embedding[...].T)):
        (dot,) = (each for each in jax.make_jaxpr(call)(x).eqns if each.primitive.name == "dot_general")
        assert dot.invars[0].aval.shape == (read, 8)
        want = np.asarray(x, np.float32) @ np.asarray(kernel, np.float32)
        np.testing.assert_allclose(np.asarray(call(x), np.float32), want, rtol=2e-2, atol=2e-2)


class TestDropout:
    @pytest.mark.parametrize(
        "make",
        [
            lambda rngs: nn.Dropout(0.5, rngs=rngs),
            pytest.param(
                lambda rngs: nn.EncoderBlock(rngs, d_model=12, num_heads=3, d_ff=16, dropout_rate=0.5),
                marks=pytest.mark.thorough,
            ),
        ],
        ids=["layer", "block"],
    )
    def test_off_at_first_on_in_training_and_explicit_beats_the_attribute(self, make):
        module, x = build(make), normal(1, 1, 5, 12)
        still = module(x)
        np.testing.assert_array_equal(module(x), still)
        assert not np.allclose(module(x, deterministic=False), still)
        module.train()
        assert not np.allclose(module(x), still)
        np.testing.assert_array_equal(module(x, deterministic=True), still)
        module.eval()
        np.testing.assert_array_equal(module(x), still)
        assert not np.allclose(nnx.view(module, deterministic=False)(x), still)

    def test_explicit_rngs_beat_stored_ones(self):
        block = build(lambda rngs: nn.EncoderBlock(rngs, d_model=12, num_heads=3, d_ff=16, dropout_rate=0.5))
        x = normal(1, 1, 5, 12)
        train = nnx.jit(lambda block, rngs: block(x, deterministic=False, rngs=rngs))
        one, two, other = (np.asarray(train(block, nnx.Rngs(dropout=seed))) for seed in (1, 1, 2))
        np.testing.assert_array_equal(one, two)
        assert not np.allclose(one, other)

    def test_attention_weights_are_dropped(self):
        attn, x = make_attention(dropout_rate=0.5), normal(1, 1, 5, 12)
        trained, still = nnx.jit(lambda attn: (attn(x, deterministic=False), attn(x)))(attn)
        assert not np.allclose(trained, still)

    def test_without_any_randomness_it_says_so(self):
        dropout = nn.Dropout(0.5)
        with pytest.raises(ValueError, match="dropout needs randomness; got dropout_rate=0.5"):
            dropout(ones(3), deterministic=False)
        assert np.sum(nn.Dropout(0.0)(ones(3), deterministic=False)) == 3

    def test_rngs_without_a_stream_say_so(self):
        with pytest.raises(ValueError, match="must have a `dropout` stream"):
            nn.Dropout(0.5)(ones(3), deterministic=False, rngs=nnx.Rngs(params=0))

    def test_rate_zero_stores_no_streams(self):
        block = nnx.eval_shape(lambda: nn.EncoderBlock(nnx.Rngs(0), d_model=12, num_heads=3, d_ff=16, dropout_rate=0.0))
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
    attend = jax.jit(lambda *arrays: reference.attention(*arrays, activation=lambda s: s * 0 + 1))
    weights = attend(ones(3, 4), ones(5, 4), ones(5, 2))
    np.testing.assert_allclose(weights, 5.0)


@pytest.mark.usefixtures("unchecked_shapes")
def test_reference_checks_shapes():
    with pytest.raises(
        ValueError, match=r"salience: query and key must agree in width; got shapes \(3, 4\) and \(5, 3\)"
    ):
        reference.attention(ones(3, 4), ones(5, 3), ones(5, 2))
    with pytest.raises(ValueError, match="weigh: there must be one weight a value"):
        reference.attention(ones(3, 4), ones(5, 4), ones(6, 2))
    with pytest.raises(ValueError, match="project: tokens and weight must agree"):
        reference.project(ones(3, 4), ones(5, 2, 2))


@pytest.mark.parametrize("block", [nn.EncoderBlock, nn.DecoderBlock])
def test_a_block_keeps_a_score_mod_and_a_kernel(block):
    own = functools.partial(attnax.memory_efficient_attention, block_size=2)
    cap = attnax.soft_cap_mod(0.1)
    sizes, x = {"d_model": 12, "num_heads": 3, "d_ff": 20, "dropout_rate": 0.0}, normal(1, 1, 5, 12)
    keeps = build(lambda rngs: block(rngs, **sizes, score_mod=cap, attention_fn=own))
    plain = build(lambda rngs: block(rngs, **sizes))
    options = {"encoder_output": x} if block is nn.DecoderBlock else {}
    run = nnx.jit(lambda one, two, x: (one(x, **options), two(x, score_mod=cap, **options), two(x, **options)))
    kept, called, without = run(keeps, plain, x)
    np.testing.assert_allclose(kept, called, atol=1e-6)
    assert keeps.attention.attention_fn is own and np.abs(kept - without).max() > 1e-3


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
                "another way to say norm_placement; got use_pre_norm=True, norm_placement='post'. Give one of the two",
            ),
            ({"pre_norm": "no"}, "pre_norm must be True or False; got pre_norm='no'"),
            ({"config": "3"}, "config must be a BlockConfig; got str"),
        ],
    )
    def test_wrong_fields_are_refused_in_words(self, fields, words):
        with pytest.raises(ValueError, match=words.replace("?", r"\?").replace(".", r"\.")):
            nn.EncoderBlock(nnx.Rngs(0), **fields)

    def test_config_and_fields_exclude_each_other(self):
        with pytest.raises(ValueError, match="give a config or fields, not both"):
            nn.EncoderBlock(nnx.Rngs(0), attnax.BlockConfig(), d_model=3)
        with pytest.raises(ValueError, match="give a config or fields, not both"):
            nn.DecoderBlock(nnx.Rngs(0), attnax.BlockConfig(), 3)

    @pytest.mark.parametrize("block", [nn.EncoderBlock, nn.DecoderBlock])
    def test_a_block_takes_its_sizes_by_position(self, block):
        one, two = (
            nnx.eval_shape(make)
            for make in (
                lambda: block(nnx.Rngs(0), 12, 3, 20, norm_type="rms"),
                lambda: block(nnx.Rngs(0), d_model=12, num_heads=3, d_ff=20, norm_type="rms"),
            )
        )
        assert nnx.graphdef(one) == nnx.graphdef(two) and one.feed_forward.up.kernel.shape == (12, 20)
        with pytest.raises(ValueError, match="d_model must be given once; got 12 by position and d_model=24"):
            block(nnx.Rngs(0), 12, 3, 20, d_model=24)
        with pytest.raises(ValueError, match="d_model must be a whole number"):
            block(nnx.Rngs(0), np.int64(12), 3, 20)

    def test_an_encoder_decoder_takes_its_configs_by_position(self):
        encoder = attnax.TransformerConfig(vocab_size=3, d_model=8, num_heads=2, d_ff=4, num_layers=1)
        decoder = dataclasses.replace(encoder, vocab_size=5)
        model = nnx.eval_shape(lambda: attnax.Transformer(nnx.Rngs(0), encoder, decoder))
        assert model.config == attnax.EncoderDecoderConfig(encoder=encoder, decoder=decoder)
        with pytest.raises(ValueError, match="decoder must be given"):
            attnax.Transformer(nnx.Rngs(0), encoder)
        with pytest.raises(ValueError, match="give a config or fields, not both; got config and decoder"):
            attnax.Transformer(nnx.Rngs(0), model.config, decoder)
        with pytest.raises(ValueError, match="encoder must be given once"):
            attnax.Transformer(nnx.Rngs(0), encoder, decoder, encoder=encoder)

    def test_fields_have_names(self):
        words = r"TransformerConfig: every field must be given by its name; got \(11, 8\) without one"
        with pytest.raises(ValueError, match=words):
            attnax.TransformerConfig(11, 8)

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
        assert attnax.BlockConfig(pre_norm=False) == attnax.BlockConfig(use_pre_norm=False)
        assert attnax.BlockConfig(use_pre_norm=True, use_rope=True).pos_emb_type == "rope"

    def test_qkv_features_must_divide(self):
        with pytest.raises(
            ValueError, match="qkv_features must be a multiple of num_heads; got qkv_features=10, num_heads=3"
        ):
            attention(nnx.Rngs(0), in_features=12, num_heads=3, qkv_features=10)
