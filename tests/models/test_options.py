"""The options of attention, blocks and feed-forwards: each against its formula, dense and in float64."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import build

import attnax
from attnax import AttentionType, BlockConfig, MultiHeadAttention, masks, nn, standard_attention
from attnax.kernels.paged import paged_attention
from attnax.nn.norms import OffsetRMSNorm
from attnax.paged_cache import init_paged_kv_cache

BASE = {"d_model": 12, "num_heads": 6, "num_kv_heads": 2, "head_dim": 4, "dropout_rate": 0.0}


def normal(seed, *shape):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def attention(**options):
    """With every parameter away from its initial value: biases, norms and sinks too."""
    return build(lambda rngs: MultiHeadAttention(rngs, **(BASE | options)))


@partial(nnx.jit, static_argnames="deterministic")
def call(module, *arguments, **options):
    return module(*arguments, **options)


@nnx.jit
def call_each(modules, *arguments, **options):
    """The results of several modules by name, from one program."""
    return {name: module(*arguments, **options) for name, module in modules.items()}


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
    "alibi behind a soft cap": {"pos_emb_type": "alibi", "attention_soft_cap": 0.7},
    "sinks": {"attention_sinks": True},
    "norm of heads": {"qk_norm": "head"},
    "norm of projections": {"qk_norm": "projection"},
    "wide values": {"value_head_dim": 7},
    "biases by name": {"use_bias": ("query", "out")},
    "partial rope": {"pos_emb_type": "rope", "rope_fraction": 0.5, "rope_base": 100.0},
    "scaled rope": {"pos_emb_type": "rope", "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_len": 64}},
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


@pytest.mark.parametrize("cross", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["self", "cross"])
def test_every_option_is_its_formula(cross):
    attns = {name: attention(**options) for name, options in OPTIONS.items()}
    x, context = normal(1, 2, 7, 12), normal(2, 2, 5, 12) if cross else None
    for name, out in call_each(attns, x, context=context).items():
        expected, _ = expected_attention(attns[name], x, context)
        np.testing.assert_allclose(out, expected, atol=2e-5, err_msg=name)


def test_weights_are_those_of_the_formula():
    attns, x = {name: attention(**OPTIONS[name]) for name in ("plain", "all together")}, normal(1, 2, 7, 12)

    @nnx.jit
    def weigh(attns):
        weights = {name: attn.attention_weights(x) for name, attn in attns.items()}
        return weights, attns["plain"].attention_weights(x, mask=masks.causal(), score_mod=attnax.alibi_mod(6))

    weights, causal = weigh(attns)
    for name, attn in attns.items():
        np.testing.assert_allclose(weights[name], expected_attention(attn, x)[1], atol=2e-6, err_msg=name)
    assert (np.triu(causal, 1) == 0).all()  # a mask and a mod of the call
    np.testing.assert_allclose(np.sum(causal, -1), 1.0, atol=1e-6)
    scores = np.log(np.asarray(causal)[:, :, 6] / np.asarray(weights["plain"])[:, :, 6])  # but for one number a head
    added = -wide(attnax.alibi_slopes(6))[:, None] * (6 - np.arange(7))
    np.testing.assert_allclose(scores - scores[..., :1], (added - added[:, :1])[None].repeat(2, 0), atol=1e-4)


def test_tiles_of_keys_give_the_same_and_every_parameter_learns():
    x, cotangent = normal(1, 2, 7, 12), normal(2, 2, 7, 12)
    attn = attention(**OPTIONS["all together"], attention_block_size=4)
    graphdef, params, rest = nnx.split(attn, nnx.Param, ...)

    @jax.jit
    def run(params):
        def loss(params):
            out = nnx.merge(graphdef, params, rest)(x)
            return (out * cotangent).sum(), out

        return jax.grad(loss, has_aux=True)(params)

    grads, out = run(params)
    np.testing.assert_allclose(out, expected_attention(attn, x)[0], atol=2e-5)
    # A key's bias adds the same to all scores of a query, and the norm takes out its length: nothing remains zero.
    assert all((np.asarray(g) != 0).any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("kind", ["standard", "memory_efficient", "pallas_flash"])
@pytest.mark.thorough
def test_every_softmax_kernel_gives_the_same_by_whole_rows_and_by_tiles(kind):
    x, options = normal(1, 2, 7, 12), {**OPTIONS["all together"], "attention_type": kind}
    attns = {"whole": attention(**options), "tiles of 4": attention(**options, attention_block_size=4)}
    for name, out in call_each(attns, x).items():
        np.testing.assert_allclose(out, expected_attention(attns[name], x)[0], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["linear", "lite"])
def test_kinds_without_a_softmax_call_their_kernels(kind):
    attn = attention(attention_type=kind, linear_attention_chunk_size=3)
    x = normal(1, 2, 7, 12)

    @nnx.jit
    def by_hand_and_called(attn):
        query, (key, value) = attn._heads(attn.query, x, 6, None), attn.keys_values(x)
        pairs = {}
        for name, mask in {"full": None, "causal": masks.causal()}.items():
            if kind == "linear":
                heads = attnax.linear_attention(query, key, value, causal=mask is not None)
            else:
                heads = attnax.lite_attention(query, key, value, attn.attention_fn.gate, mask=mask)
            pairs[name] = attn.out(heads.swapaxes(1, 2).reshape(2, 7, -1)), attn(x, mask=mask)
        return pairs

    for name, pair in by_hand_and_called(attn).items():
        np.testing.assert_allclose(*pair, atol=1e-5, err_msg=name)


def test_the_gate_of_lite_attention_learns():
    graphdef, params = nnx.split(attention(attention_type="lite"))
    loss = lambda params: (nnx.merge(graphdef, params)(normal(1, 1, 5, 12)) ** 2).sum()
    grads = jax.jit(jax.grad(loss))(params)
    assert (np.asarray(nnx.to_pure_dict(grads)["attention_fn"]["gate"]["kernel"]) != 0).all()


@pytest.mark.parametrize("kind", ["linear", "lite"])
def test_a_cache_of_keys_is_refused_where_it_is_not_read(kind):
    attn, cache = attention(attention_type=kind), attnax.init_kv_layer_cache(1, 2, 4, 5)
    with pytest.raises(NotImplementedError, match=f"{kind} attention does not read a KVLayerCache"):
        jax.eval_shape(lambda x: attn(x, kv_cache=cache), normal(1, 1, 2, 12))


def test_layers_of_one_config_are_one_program():
    for kind in AttentionType:
        one, two = (nnx.split(attention(attention_type=kind, attention_block_size=4))[0] for _ in range(2))
        assert one == two and hash(one) == hash(two)


def test_attention_dropout_drops_weights_and_nothing_else():
    """Values that are all the same: without dropout every mixture of them is that value."""
    attn = attention(attention_dropout_rate=0.5, use_bias=True)
    attn.value.kernel[...] = jax.device_put(np.zeros(attn.value.kernel.shape, np.float32))
    attn.value.bias[...] = jax.device_put(np.ones(attn.value.bias.shape, np.float32))
    attn.out.kernel[...] = jax.device_put(np.eye(24, 12, dtype=np.float32))
    attn.out.bias[...] = jax.device_put(np.zeros(12, np.float32))
    x = normal(1, 1, 101, 12)
    np.testing.assert_allclose(call(attn, x), 1.0, atol=1e-6)
    train = nnx.jit(lambda attn, key: attn(x, deterministic=False, rngs=nnx.Rngs(dropout=key)))
    dropped, again = (np.asarray(train(attn, jax.random.key(3))) for _ in range(2))
    assert 0.05 < dropped.std() < 0.5 and abs(dropped.mean() - 1.0) < 0.02
    np.testing.assert_array_equal(dropped, again)


def test_linear_attention_trains_under_the_default_dropout_of_a_config():
    config = BlockConfig(d_model=12, num_heads=3, d_ff=8, attention_type="linear")
    block = build(lambda rngs: nn.EncoderBlock(rngs, config))
    assert np.isfinite(call(block, normal(1, 1, 5, 12), deterministic=False)).all()


def test_a_projected_context_stands_for_the_context():
    attn = build(lambda rngs: MultiHeadAttention(rngs, **BASE, use_rope=True, context_features=5))
    x, context = normal(1, 2, 7, 12), normal(2, 2, 3, 5)
    positions = np.array([2, 5, 6])
    expected = call(attn, x, context=context, position_ids_kv=positions)
    projected = nnx.jit(lambda attn: attn.keys_values(context, positions))(attn)
    np.testing.assert_array_equal(call(attn, x, context=projected), expected)


def test_objects_may_stand_for_the_options():
    objects = build(
        lambda rngs: MultiHeadAttention(
            rngs,
            **BASE,
            rope=nn.RotaryEmbedding(4),
            query_norm=nnx.RMSNorm(4, rngs=rngs),
            key_norm=nnx.RMSNorm(4, rngs=rngs),
        )
    )
    options = attention(use_rope=True, qk_norm="head")
    nnx.update(options, nnx.state(objects))
    x = normal(1, 1, 5, 12)
    np.testing.assert_array_equal(call(objects, x), call(options, x))


def test_sinks_need_a_kernel_that_gives_the_log_sum():
    def plain(query, key, value, *, mask=None, score_mod=None, dropout_rng=None, dropout_rate=0.0, deterministic=True):
        return standard_attention(query, key, value)

    for options in ({"attention_fn": plain}, {"attention_type": "lite"}):
        with pytest.raises(ValueError, match="attention_sinks needs an attention function with return_lse"):
            attention(attention_sinks=True, **options)
    with pytest.raises(ValueError, match="attention_scale needs an attention function with scale"):
        attention(attention_scale=0.3, attention_fn=plain)


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
    attn = attention(attention_scale=0.55, dtype="bfloat16")
    x = jnp.asarray(np.asarray(normal(1, 1, 7, 12)), jnp.bfloat16)

    @nnx.jit
    def by_hand(attn):
        query, (key, value) = attn._heads(attn.query, x, 6, None), attn.keys_values(x)
        heads = standard_attention(query, key, value, scale=0.55)
        return attn.out(heads.swapaxes(1, 2).reshape(1, 7, -1))

    np.testing.assert_array_equal(call(attn, x), by_hand(attn))


ONES = jax.device_put(np.ones(6, np.float32))
ORDER = ONES.astype(int)
PARAM = nnx.Param(ONES)


class Holder:
    def __init__(self, held):
        self.held = held

    def scale(self, scores, b, h, q, kv):
        return scores * self.held[h]


def layer(**options):
    """Made without its weights."""
    return nnx.eval_shape(lambda: MultiHeadAttention(nnx.Rngs(0), **BASE, **options))


def scaled_by(slopes, scores, b, h, q, kv):
    return scores * slopes[h]


def closing_over(slopes):
    return lambda scores, b, h, q, kv: scores * slopes[0][h]


def scaled_by_default(scores, b, h, q, kv, slopes=(ONES,)):
    return scores * slopes[0][h]


@jax.custom_jvp
def doubled(scores):
    return scores * ONES[0]


doubled.defjvp(lambda primals, tangents: (primals[0], tangents[0]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slopes:
    slopes: jax.Array

    def __call__(self, scores, b, h, q, kv):
        return scores * self.slopes[h]


HIDING = {
    "closure": closing_over([PARAM]),
    "bound method": Holder(ONES).scale,
    "global": lambda scores, b, h, q, kv: scores * ONES[h],
    "global parameter": lambda scores, b, h, q, kv: scores * PARAM[h],
    "default": scaled_by_default,
    "partial": partial(scaled_by, ONES),
    "nested": lambda scores, *indices: scaled_by_default(scores, *indices) + 1,
    "composed": attnax.compose_score_mods(attnax.soft_cap_mod(3.0), scaled_by_default),
    "at positions": masks.at_positions(scaled_by_default, np.arange(3), np.arange(3)),
    "jit": jax.jit(scaled_by_default),
    "branch": lambda scores, *_: jax.lax.cond(scores.sum() > 0, lambda: scores, lambda: scores * ONES[0]),
    "custom derivative": lambda scores, *_: doubled(scores),
    "as a whole": lambda scores, *_: scores * ONES[None, :, None, None],
}
"""Score mods that read a JAX array which is no leaf of them."""


@pytest.mark.parametrize("how", HIDING)
def test_a_stored_score_mod_may_not_hide_arrays(how):
    with pytest.raises(ValueError, match=r"score_mod must not hide arrays.*reads float32.*may be a NumPy array"):
        layer(score_mod=HIDING[how])


def test_a_stored_score_mod_may_not_hide_traced_arrays():
    def make(array, mod):
        MultiHeadAttention(nnx.Rngs(0), **BASE, score_mod=mod(array))

    jax.eval_shape(partial(make, mod=Slopes), ONES)
    with pytest.raises(ValueError, match="score_mod must not hide arrays"):
        jax.eval_shape(partial(make, mod=partial(partial, scaled_by)), ONES)


def made_anew(scores, b, h, q, kv):
    with jax.ensure_compile_time_eval():
        slopes = jnp.arange(6.0) + 1
    return scores * slopes[h]


CONSTANT = {
    "numpy": lambda scores, b, h, q, kv: scores * jnp.asarray(np.ones(6, np.float32))[h],
    "list": lambda scores, b, h, q, kv: scores * jnp.array([1.0] * 6)[h],
    "integers": lambda scores, b, h, q, kv, order=ORDER: scores * order[h],
    "made anew": made_anew,
    "leaf": Slopes(ONES),
    "leaf of a partial": jax.tree_util.Partial(scaled_by, ONES),
    "not for this size": lambda scores, *_: scores.reshape(2, 6, 15) * np.ones((2, 6, 15), np.float32),
}


@pytest.mark.parametrize("what", CONSTANT)
def test_a_stored_score_mod_may_read_constants_and_leaves(what):
    layer(score_mod=CONSTANT[what])


def test_a_stored_score_mod_made_for_the_sizes_of_a_call_is_checked_in_it():
    whole = jax.device_put(np.ones((2, 6, 15), np.float32))

    def mod(scores, *_):
        return (scores.reshape(2, 6, 15) + whole).reshape(2, 6, 3, 5)

    def attend(x, context):
        attn = MultiHeadAttention(nnx.Rngs(0), **BASE, score_mod=mod, attention_type="standard")
        with pytest.raises(ValueError, match="score_mod must not hide arrays"):
            attn(x, context=context)

    jax.eval_shape(attend, normal(1, 2, 3, 12), normal(2, 2, 5, 12))


def test_a_stored_score_mod_may_fail_where_no_call_is_made():
    def mod(scores, *_):
        raise RuntimeError("this machine lacks something")

    MultiHeadAttention(nnx.Rngs(0), **BASE, score_mod=mod)


def test_a_stored_attention_function_may_not_hide_arrays():
    def tempered(query, key, value, **options):
        return standard_attention(query * ONES[0], key, value, **options)

    for hiding in (
        tempered,
        partial(standard_attention, score_mod=Slopes(ONES)),
        partial(partial(standard_attention, score_mod=scaled_by_default), return_lse=False),
        partial(standard_attention, scale=ONES[0]),
    ):
        with pytest.raises(ValueError, match=r"(attention_fn|score_mod) must not hide arrays, which get no gradient"):
            layer(attention_fn=hiding)
    cache = init_paged_kv_cache(
        num_blocks=2, block_size=4, num_kv_heads=6, head_dim=2, batch_size=1, max_blocks_per_seq=2
    )
    for visible in (partial(paged_attention, cache=cache), jax.tree_util.Partial(standard_attention, scale=ONES[0])):
        layer(attention_fn=visible)


def test_a_stored_rotation_may_not_hide_arrays():
    with pytest.raises(ValueError, match="rope must not hide arrays"):
        layer(rope=lambda heads, positions: heads * ONES[0])


def test_nothing_gives_nothing():
    attn = attention(qk_norm="head", use_bias=False)
    for shape in ((0, 5, 12), (2, 0, 12)):
        assert call(attn, np.zeros(shape, np.float32)).shape == shape
    context = np.zeros((2, 0, 12), np.float32)
    assert (np.asarray(call(attn, np.ones((2, 3, 12), np.float32), context=context)) == 0).all()


def test_a_config_and_sizes_exclude_each_other():
    with pytest.raises(ValueError, match="a config sets the sizes; got a config and in_features or qkv_features"):
        MultiHeadAttention(nnx.Rngs(0), BlockConfig(**BASE), qkv_features=12)
    attn = attention()
    with pytest.raises(ValueError, match="got position_ids_kv with KeysValues"):
        jax.eval_shape(
            lambda x: attn(x, context=attn.keys_values(x), position_ids_kv=np.arange(3)), normal(1, 1, 3, 12)
        )


ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def expected_feed_forward(layer, name, x):
    hidden = project(layer.up, x)
    if name == "swiglu_clipped":
        gate = np.minimum(project(layer.gate, x), 7)
        assert gate.max() == 7 and hidden.max() > 7 and hidden.min() < -7
        hidden = gate / (1 + np.exp(-1.702 * gate)) * (np.clip(hidden, -7, 7) + 1)
    elif name in GATED:
        hidden = ACTIVATIONS[GATED[name]](project(layer.gate, x)) * hidden
    else:
        hidden = ACTIVATIONS["silu" if name == "swish" else name](hidden)
    return hidden @ wide(layer.down.kernel[...]) + wide(layer.down.bias[...])


def test_every_activation_is_its_formula():
    names = [*ACTIVATIONS, "swish", *GATED, "swiglu_clipped"]
    layers = {name: build(lambda rngs, name=name: nn.FeedForward(rngs, 5, 7, ff_activation=name)) for name in names}
    x = 2 * np.asarray(normal(1, 5, 5))
    for factor, some in ((1, names[:-1]), (6, names[-1:])):  # six times as far, to be clipped
        for name, out in call_each({name: layers[name] for name in some}, factor * x).items():
            expected = expected_feed_forward(layers[name], name, factor * x)
            np.testing.assert_allclose(out, expected, atol=1e-5, rtol=1e-5 if factor > 1 else 0, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_offset_is_added_to_the_scales_of_rms_norms(dtype):
    fields = {"d_model": 12, "num_heads": 3, "norm_type": "rms", "norm_offset": 1.0, "dtype": dtype}
    block = build(lambda rngs: nn.EncoderBlock(rngs, **fields, param_dtype=dtype, qk_norm="head"))
    norms, xs = {"block": block.around_attention.norm_in, "heads": block.attention.query_norm}, {}
    for name, norm in norms.items():
        assert norm.scale[...].dtype == dtype
        norm.scale[...] = jnp.asarray(np.asarray(normal(1, *norm.scale.shape)) / 100, dtype)
        xs[name] = jnp.asarray(np.asarray(normal(2, 5, norm.num_features)), dtype)
    out = nnx.jit(lambda norms: {name: norm(xs[name]) for name, norm in norms.items()})(norms)
    for name, norm in norms.items():
        x = wide(xs[name])
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + wide(norm.scale[...]))
        assert out[name].dtype == dtype  # 1 + scale has not been rounded to it
        np.testing.assert_allclose(wide(out[name]), y, rtol=1e-6 if dtype == "float32" else 2**-8, atol=1e-6)


def test_scales_with_an_offset_begin_at_0():
    norm = OffsetRMSNorm(5, offset=1.0, rngs=nnx.Rngs(0))
    assert (np.asarray(norm.scale[...]) == 0).all()


def sublayers(block):
    return block.attention, block.feed_forward


@pytest.mark.parametrize(
    "placement",
    # The four of a single residual connection are tested for it, in test_nn.py.
    ["sandwich", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("pre", "post", "branch"))],
)
def test_norms_stand_where_the_config_says(placement):
    config = BlockConfig(
        d_model=12, num_heads=3, d_ff=8, dropout_rate=0.0, norm_placement=placement, residual_scale=0.7
    )
    block = build(lambda rngs: nn.EncoderBlock(rngs, config))

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
    block = build(lambda rngs: nn.EncoderBlock(rngs, config))

    @nnx.jit
    def by_hand_and_called(block, x):
        attend, feed_forward = sublayers(block)
        out = x + attend(block.around_attention.norm_in(x)) + feed_forward(block.around_feed_forward.norm_in(x))
        return out, block(x)

    np.testing.assert_allclose(*by_hand_and_called(block, normal(1, 1, 5, 12)), atol=1e-5)


def make_decoder_block():
    config = BlockConfig(d_model=12, num_heads=3, d_ff=8, dropout_rate=0.0, use_bias=False, pos_emb_type="rope")
    return build(lambda rngs: nn.DecoderBlock(rngs, config, encoder_features=7))


def decoder_block_arguments():
    seen = np.array([[True, True, False], [True, True, True]])
    return normal(1, 2, 5, 12), normal(2, 2, 3, 7), {"self_mask": masks.causal(), "cross_mask": masks.padding(seen)}


def test_a_decoder_block_is_its_three_sublayers():
    block = make_decoder_block()
    x, encoded, options = decoder_block_arguments()

    @nnx.jit
    def by_hand_and_called(block):
        out = x + block.attention(block.around_attention.norm_in(x), mask=masks.causal())
        out = out + block.cross_attention(
            block.around_cross_attention.norm_in(out), context=encoded, mask=options["cross_mask"]
        )
        expected = out + block.feed_forward(block.around_feed_forward.norm_in(out))
        contexts = block.cross_attention.keys_values(encoded)
        return expected, {
            "encoder output": block(x, encoder_output=encoded, **options),
            "keys and values": block(x, encoder_output=contexts, **options),
        }

    expected, called = by_hand_and_called(block)
    for name, out in called.items():
        np.testing.assert_allclose(out, expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.contract)])
def test_a_decoder_block_goes_on_over_its_cache(size):
    """Rotated by the cache's positions, in cross-attention too, or by given ones."""
    block, (x, encoded, options) = make_decoder_block(), decoder_block_arguments()
    cache, parts = attnax.init_kv_layer_cache(2, 3, 4, 6), []
    for start in range(0, 5 // size * size, size):
        positions = {} if size == 1 else {"position_ids_cross_q": np.arange(start, start + size)}
        chunk = np.asarray(x)[:, start : start + size]
        part, cache = call(block, chunk, encoder_output=encoded, self_attn_kv_cache=cache, **options, **positions)
        parts.append(part)
    found, expected = np.concatenate(parts, axis=1), np.asarray(call(block, x, encoder_output=encoded, **options))
    np.testing.assert_allclose(found, expected[:, : found.shape[1]], atol=1e-5)


def test_a_decoder_block_refuses_a_parallel_residual():
    with pytest.raises(ValueError, match="cross-attention reads the result of self-attention"):
        nn.DecoderBlock(nnx.Rngs(0), d_model=12, num_heads=3, parallel_residual=True)


def test_initial_weights_have_the_size_that_their_name_says():
    expected = {
        "lecun_normal": 400**-0.5,
        "he_normal": (2 / 400) ** 0.5,
        "xavier_normal": (2 / 700) ** 0.5,
        "xavier_uniform": (2 / 700) ** 0.5,
        "normal": 0.013,
    }

    @jax.jit
    def kernels():
        configs = {
            name: BlockConfig(d_model=400, num_heads=1, d_ff=300, kernel_init=name, init_std=0.013) for name in expected
        }
        return {name: nn.FeedForward(nnx.Rngs(0), config).up.kernel[...] for name, config in configs.items()}

    for name, kernel in kernels().items():
        std = expected[name]
        assert abs(np.std(kernel) / std - 1) < 0.01, name
        uniform = np.abs(kernel).max() < std * 3**0.5 * 1.001
        assert uniform == (name == "xavier_uniform"), name


def test_depth_scales_the_branches_of_the_stream():
    config = attnax.TransformerConfig(vocab_size=7, num_layers=8, d_model=64, num_heads=1, d_ff=64)

    @jax.jit
    def kernels():
        made = {}
        for name in ("depth", "none"):
            block = nn.EncoderBlock(nnx.Rngs(0), dataclasses.replace(config, residual_init=name))
            made[name] = block.attention.out.kernel[...], block.feed_forward.down.kernel[...]
        return made

    expected = {"depth": 0.25, "none": 1.0}
    for name, both in kernels().items():
        for kernel in both:
            assert abs(np.std(kernel) * 8 / expected[name] - 1) < 0.05, name
