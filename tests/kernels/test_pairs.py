"""Masks and score mods look at one pair at a time in every tiled kernel, whatever they are made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import contract_unless
from flax import nnx
from jax import lax

from attnax import (
    AttentionType,
    MultiHeadAttention,
    TransformerLM,
    cached_attention,
    flash_attention,
    init_kv_layer_cache,
    masks,
    memory_efficient_attention,
    pallas_flash_attention,
    ring_attention,
    standard_attention,
    update_kv_layer_cache,
    why_not_pallas,
)
from attnax.kernels._call import prepare
from attnax.kernels._core.pairs import MixedPairsError, lift_pairs
from attnax.kernels.score_mods import compose_score_mods, soft_cap_mod

FULL = 2, 3, 5, 7
TABLE = np.arange(27, dtype=np.float32).reshape(3, 9)
WEIGHTS = np.ones((5, 11), np.float32)
COEFFICIENTS = np.ones(4, np.float32)


def a_network(s, b, h, q, kv):
    features = jnp.stack(jnp.broadcast_arrays(s, b * 1.0, h * 1.0, q * 1.0, kv * 1.0), -1)
    return (jnp.tanh(features @ WEIGHTS) @ WEIGHTS.T)[..., 0]


def a_flat_network(s, *_):
    return (jax.nn.gelu(s.reshape(-1, 1) @ WEIGHTS[:1]) @ WEIGHTS[:1].T).reshape(s.shape)


def of_every_pair(s, b, h, q, kv):
    function = lambda x, b, h, q, kv: x + jnp.asarray(TABLE)[h, jnp.clip(q - kv, 0, 8)] + b
    for axis in (4, 3, 2, 1):
        function = jax.vmap(function, tuple(0 if i in (0, axis) else None for i in range(5)))
    return function(s, b.ravel(), h.ravel(), q.ravel(), kv.ravel())


def a_while_loop_of_each(s, *_):
    of_one = lambda x: lax.while_loop(lambda c: c < 5, lambda c: jnp.abs(c) * 2 + 1, x)
    return jax.vmap(jax.vmap(of_one))(s.reshape(-1, s.shape[-1])).reshape(s.shape)


def bits_of_a_row(s, b, h, q, kv):
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(q.ravel())
    return s + jax.vmap(jax.random.uniform)(keys)[None, None, :, None]


def of_features(s, b, h, q, kv):
    both = jnp.stack([s, q - kv + 0 * s], -1)
    return jnp.sort(both)[..., 0] + both.max(-1) + both.mean(-1) + jnp.cumsum(both, -1)[..., 1] + both.prod(-1)


def by_kernels(s, b, h, q, kv):
    waves = jnp.arange(4.0)[None]
    of_queries, of_keys = jnp.sin(q.reshape(-1, 1) * waves), jnp.cos(kv.reshape(-1, 1) * waves)
    return s + jnp.einsum("tf,sf->ts", of_queries, of_keys)[None, None]


@jax.custom_jvp
def with_a_rule(x):
    return x * 2


with_a_rule.defjvp(lambda primals, tangents: (with_a_rule(*primals), tangents[0] * 2))

ELEMENTWISE = {
    "network": a_network,
    "flat network": a_flat_network,
    "vmap": of_every_pair,
    "while": a_while_loop_of_each,
    "random": bits_of_a_row,
    "features": of_features,
    "outer product": by_kernels,
    "polynomial": lambda s, *_: jnp.polyval(COEFFICIENTS, s) + jnp.interp(s, np.arange(4.0), COEFFICIENTS),
    "scan": lambda s, *_: lax.scan(lambda sum, c: (sum * s + c, None), jnp.zeros_like(s), COEFFICIENTS)[0],
    "map over rows": lambda s, *_: lax.map(jnp.sin, s),
    "loop": lambda s, *_: lax.fori_loop(0, 3, lambda i, x: x * 0.5 + i, s),
    "cond": lambda s, *_: jnp.vectorize(lambda x: lax.cond(x > 0, jnp.sin, jnp.cos, x))(s),
    "rules": lambda s, *_: with_a_rule(s) + jax.nn.relu(s) + jax.nn.log_sigmoid(s) + jax.checkpoint(jnp.sin)(s),
    "one hot": lambda s, b, h, q, kv: s + jax.nn.one_hot(jnp.clip(q - kv, 0, 8), 9) @ TABLE[0],
    "pieces": lambda s, *_: jnp.piecewise(s, [s < 0, s >= 0], [jnp.sin, jnp.cos]) + jnp.select([s > 0], [s]),
    "written into": lambda s, *_: jnp.zeros((*s.shape, 3)).at[..., 1].set(s).sum(-1),
    "table": lambda s, b, h, q, kv: s * jnp.asarray(TABLE)[:, 0][h] + TABLE.sum() + jnp.asarray(TABLE).max(0)[kv % 9],
    "special": lambda s, *_: jax.scipy.special.erf(s) + jax.nn.silu(s) + jnp.searchsorted(TABLE[0], s),
    "rounded": lambda s, *_: lax.reduce_precision(s, 8, 10) + jnp.take(TABLE[0], 3) + jnp.argmax(TABLE[0]),
}

MIXED = {
    "top k": lambda s, *_: jnp.where(s >= lax.top_k(s, 2)[0][..., -1:], s, -jnp.inf),
    "mean": lambda s, *_: s - s.mean(-1, keepdims=True),
    "softmax": lambda s, *_: jax.nn.softmax(s),
    "median": lambda s, *_: s - jnp.median(s, -1, keepdims=True),
    "cumulative sum": lambda s, *_: jnp.cumsum(s, -1),
    "associative scan": lambda s, *_: lax.associative_scan(jnp.add, s, axis=-1),
    "scan": lambda s, *_: lax.scan(lambda sum, x: (sum + x, sum), jnp.zeros(s.shape[1:]), s)[1],
    "roll": lambda s, *_: jnp.roll(s, 1, -1),
    "flip": lambda s, *_: jnp.flip(s, -1),
    "first": lambda s, *_: s - s[..., :1],
    "difference": lambda s, *_: s + jnp.diff(s, axis=-1, prepend=0),
    "sort": lambda s, *_: jnp.sort(s, -1),
    "argmax": lambda s, b, h, q, kv: jnp.where(kv == s.argmax(-1, keepdims=True), s, 0),
    "heads": lambda s, *_: s - s.mean(1, keepdims=True),
    "mixed heads": lambda s, *_: jnp.einsum("bnts,nm->bmts", s, np.ones((s.shape[1],) * 2, np.float32)),
    "rows": lambda s, *_: s + s[::-1],
    "gather": lambda s, b, h, q, kv: jnp.take_along_axis(s, 0 * kv + 0 * q, -1),
    "the first query": lambda s, b, h, q, kv: s + q[0, 0, 0, 0],
    "greatest key": lambda s, b, h, q, kv: s + kv.max(),
    "number of keys": lambda s, b, h, q, kv: s * kv.size,
    "number of keys as floating": lambda s, *_: s / jnp.ones_like(s).sum(-1, keepdims=True),
    "shape": lambda s, b, h, q, kv: jnp.where(kv >= s.shape[-1] - 3, s, 0),
    "loop of as many steps": lambda s, *_: sum(s * i for i in range(s.shape[-1])),
    "sum of as many ones": lambda s, b, h, q, kv: s * (jnp.ones(kv.size) @ jnp.ones(kv.size)),
    "scan over as many ones": lambda s, b, h, q, kv: (
        s + lax.scan(lambda c, x: (c + x, None), 0.0, jnp.ones(kv.size))[0]
    ),
    "read beyond as many ones": lambda s, b, h, q, kv: s + jnp.ones(kv.size).at[kv + 2].get(mode="fill", fill_value=0),
    "as many steps": lambda s, *_: lax.fori_loop(0, s.shape[-1], lambda _, x: x * 1.5, s),
    "fill value": lambda s, b, h, q, kv: s + jnp.asarray(TABLE[0]).at[kv + 5].get(mode="fill", fill_value=kv.size),
    "number of queries in a table": lambda s, b, h, q, kv: s + jnp.asarray(TABLE)[0, q.size % 9],
    "other if there are many": lambda s, *_: s * 2 if s.shape[-1] > 2 else s,
    "dtype if there are many": lambda s, *_: s.astype(jnp.bfloat16 if s.shape[-2] > 2 else jnp.float16) + s,
    "places": lambda s, *_: s + jnp.arange(s.shape[-1])[None, None, None],
    "noise": lambda s, *_: s + jax.random.normal(jax.random.key(0), s.shape),
    "turned": lambda s, b, h, q, kv: s + q.reshape(1, 1, 1, -1)[..., : s.shape[-1]].sum(),
    "scatter": lambda s, b, h, q, kv: s + jnp.zeros((1, 1, 1, s.shape[-1])).at[..., kv.ravel()].add(1.0),
    "while": lambda s, *_: lax.while_loop(lambda x: jnp.any(x > 1), lambda x: x / 2, s),
    "transform": lambda s, *_: jnp.fft.fft(s).real,
    "callback": lambda s, *_: jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(s.shape, s.dtype), s),
    "whole array": lambda s, *_: s + np.arange(s[0, 0].size).reshape(1, 1, *s.shape[2:]),
    "merged axes": lambda s, *_: (
        s.reshape(-1, 2).max(-1, keepdims=True).repeat(2, -1).reshape(s.shape) if s.size % 2 == 0 else s.max()
    ),
}

MIXED_MASKS = {
    "greatest key": lambda b, h, q, kv: kv >= kv.max() - 5,
    "number of keys": lambda b, h, q, kv: kv >= kv.size - 5,
    "any": lambda b, h, q, kv: jnp.any(q >= kv),
    "whether there are many": lambda b, h, q, kv: kv.size > 5,
    "whole array": lambda b, h, q, kv: np.tri(q.size, kv.size, dtype=bool),
}


def why_not_pairs(function, score_shape, *, has_scores):
    try:
        lift_pairs("here", function, score_shape, frozenset(), scores=jnp.float32 if has_scores else None)
    except MixedPairsError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_what_looks_at_one_pair_is_taken_whatever_it_is_made_of(name):
    for full in (FULL, (1, 1, 5, 7), (1, 1, 1, 1)):
        assert why_not_pairs(ELEMENTWISE[name], full, has_scores=True) is None


def test_all_of_them_together_are_the_same_in_tiles():
    x = jax.device_put(np.random.default_rng(0).standard_normal((1, 3, 13, 4), np.float32))

    def mod(s, b, h, q, kv):
        return sum(jnp.tanh(function(s, b, h, q, kv)) for function in ELEMENTWISE.values())

    def run(x):
        kernels = standard_attention, functools.partial(memory_efficient_attention, block_size=4), flash_attention
        return [kernel(x, x, x, score_mod=mod) for kernel in kernels]

    want, *have = jax.jit(run)(x)
    for out in have:
        np.testing.assert_allclose(out, want, atol=2e-6)


@pytest.mark.parametrize("full", [FULL, *(contract_unless(False, x) for x in ((2, 3, 6, 8), (4, 4, 4, 4)))], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_pairs_is_refused_at_any_size(name, full):
    assert why_not_pairs(MIXED[name], full, has_scores=True) is not None


@pytest.mark.parametrize("name", MIXED_MASKS)
def test_a_mask_that_mixes_pairs_is_refused(name):
    assert why_not_pairs(MIXED_MASKS[name], FULL, has_scores=False) is not None


def test_pairs_may_be_mixed_with_those_of_the_own_key_alone():
    swapped = lambda s, b, h, q, kv: s + s.swapaxes(2, 3)
    assert "mixes keys and queries" in why_not_pairs(swapped, (2, 3, 5, 5), has_scores=True)


def zeros(*shape):
    return jax.device_put(np.zeros(shape, np.float32))


def cached(query, key, value, **options):
    cache = update_kv_layer_cache(init_kv_layer_cache(1, 3, 4, max_len=11), key, value)
    return cached_attention(query, cache, np.arange(query.shape[2]), **options)


KERNELS = {
    "flash": flash_attention,
    "memory efficient": memory_efficient_attention,
    "pallas": functools.partial(pallas_flash_attention, interpret=True),
    "tpu": functools.partial(pallas_flash_attention, interpret="tpu"),
    "ring": ring_attention,
    "few cached": cached,
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_in_tiles_says_what_is_mixed_and_who_computes_it(name):
    x = zeros(1, 3, 5, 4)
    for options, words in (
        ({"score_mod": MIXED["top k"]}, "mixes keys by top_k.*standard_attention"),
        ({"score_mod": compose_score_mods(soft_cap_mod(3.0), MIXED["heads"])}, "mixes heads by reduce_sum"),
        ({"mask": MIXED_MASKS["greatest key"]}, "mask must look at one pair.*mixes keys by reduce_max"),
        ({"mask": masks.causal() & MIXED_MASKS["number of keys"]}, "reads the sizes of its arguments"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            KERNELS[name](x, x, x, **options)


def test_positions_around_a_function_do_not_hide_what_it_mixes():
    x, positions = zeros(1, 3, 5, 4), jnp.arange(5)
    mod = masks.at_positions(MIXED["mean"], positions, positions)
    with pytest.raises(NotImplementedError, match="mixes keys by reduce_sum"):
        flash_attention(x, x, x, score_mod=mod)
    assert "mixes keys by reduce_sum" in why_not_pallas(x, x, x, score_mod=mod, platform="cuda")


def test_standard_attention_and_its_layers_go_on_mixing_pairs_also_when_they_generate():
    x = jax.device_put(np.random.default_rng(0).standard_normal((1, 3, 5, 4), np.float32))
    mean = standard_attention(x, x, x, score_mod=MIXED["heads"])
    scores = np.einsum("bnth,bnsh->bnts", x, x) / 2
    scores = scores - scores.mean(1, keepdims=True)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(mean, weights @ np.asarray(x), rtol=1e-5, atol=1e-6)

    model = TransformerLM(
        nnx.Rngs(0),
        vocab_size=11,
        d_model=8,
        num_heads=2,
        num_layers=1,
        d_ff=8,
        pos_emb_type="rope",
        attention_type=AttentionType.STANDARD,
    )

    def nearest(s, b, h, q, kv):  # the two best of those that a query may attend
        seen = jnp.where((kv >= 0) & (kv <= q), s, -jnp.inf)
        return jnp.where(seen >= lax.top_k(seen, 2)[0][..., -1:], seen, -jnp.inf)

    (layer,) = model.decoder.stack.layers()
    layer.attention = MultiHeadAttention(nnx.Rngs(1), model.config, score_mod=nearest)
    prompt = np.array([[3, 1, 4, 1]])
    written = np.asarray(model.generate(prompt, max_new_tokens=3).tokens)
    logits = jax.jit(model.__call__)(np.concatenate([prompt, written], 1))
    np.testing.assert_array_equal(written, logits[:, 3:-1].argmax(-1))
    with pytest.raises(NotImplementedError, match="AttentionType.STANDARD"):
        MultiHeadAttention(nnx.Rngs(0), num_heads=2, in_features=8, score_mod=nearest)(zeros(1, 3, 8))


def test_a_numpy_array_that_is_indexed_gets_words():
    x = zeros(1, 3, 5, 4)
    read = {"score_mod": lambda s, b, h, q, kv: s + TABLE[h, q]}, {"mask": lambda b, h, q, kv: TABLE[h, q] > 2}
    for options in read:
        with pytest.raises(ValueError, match=r"jnp\.asarray\(array\)\[\.\.\.\]"):
            flash_attention(x, x, x, **options)
    for mask in (lambda b, h, q, kv: kv <= q and kv >= 0, lambda b, h, q, kv: not kv > q):
        with pytest.raises(ValueError, match=r"jnp\.where for `if`, `&`"):
            flash_attention(x, x, x, mask=mask)


def program(score_mod):
    x = zeros(1, 3, 5, 4)
    call = prepare("here", x, x, x, block_size=None, backend="tiles", score_mod=score_mod)
    return call.operands.score_mod.program


@pytest.mark.parametrize("name", sorted(set(ELEMENTWISE) - {"random"}))
def test_a_function_made_again_is_the_same_program(name):
    again = [lambda s, *indices: ELEMENTWISE[name](s, *indices) + 0 for _ in range(2)]
    assert program(again[0]) == program(again[1])


def test_functions_of_other_rules_are_other_programs():
    def doubled(slope):
        function = jax.custom_jvp(lambda x: x * 2)
        function.defjvp(lambda primals, tangents: (function(*primals), tangents[0] * slope))
        return lambda s, *_: function(s)

    assert program(doubled(2.0)) == program(doubled(2.0))
    assert program(doubled(2.0)) != program(doubled(3.0))
