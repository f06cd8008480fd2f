"""Numbers of tokens in the scores: exact against their formula, with gradients, and the same behind every cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import build

from attnax import (
    EncoderBlock,
    MultiHeadAttention,
    init_kv_layer_cache,
    init_linear_layer_cache,
    init_paged_kv_cache,
    init_ring_kv_cache,
    masks,
    ring_attention,
)
from attnax.cache import EmptyCache, forget, grow, init_scalar_cache, select_rows

WIDTH, HEADS, KV_HEADS, SIZE, LENGTH = 12, 4, 2, 3, 11
SIZES = {"d_model": WIDTH, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": SIZE, "dropout_rate": 0.0}
X = np.random.default_rng(1).normal(size=(2, LENGTH, WIDTH))
REAL = np.arange(LENGTH)[None] >= np.array([[3], [0]])  # padding to the left of the first row
POSITIONS = np.where(REAL, np.cumsum(REAL, axis=1) - 1, -1).astype(np.int32)


class ForgetGate(nnx.Module):
    """Lin et al. 2025: a score loses the logarithms of the forget gates between query and key."""

    cumulative = True

    def __init__(self, rngs, num_heads=HEADS, dtype=jnp.float32):
        self.gate = nnx.Linear(WIDTH, num_heads, rngs=rngs, dtype=dtype, param_dtype=dtype)

    def __call__(self, x):
        return jax.nn.log_sigmoid(self.gate(x)).swapaxes(1, 2)

    def mod(self, scores, b, h, q, kv, of_query, of_key):
        return scores + of_query - of_key


class Temperature(ForgetGate):
    """Zhang et al. 2024: each query scales its scores; with a parameter that the mod reads itself."""

    cumulative = False

    def __init__(self, rngs, num_heads=HEADS, dtype=jnp.float32):
        super().__init__(rngs, num_heads, dtype)
        self.strength = nnx.Param(jnp.ones((1, 1), dtype))

    def mod(self, scores, b, h, q, kv, of_query, of_key):
        return scores * (1 - self.strength[0, 0].astype(scores.dtype) * of_query)


def attention(kind=ForgetGate, num_heads=HEADS, **options):
    dtype = options.get("dtype", "float32")
    options |= {"param_dtype": dtype}
    return build(lambda rngs: MultiHeadAttention(rngs, **(SIZES | options), token_scalars=kind(rngs, num_heads, dtype)))


def formula(attn, x, mask):
    """Attention of the pairs in `mask` (B|1, T, T), dense."""
    query, key, value = (
        layer(x).reshape(*x.shape[:2], count, SIZE).swapaxes(1, 2)
        for layer, count in ((attn.query, HEADS), (attn.key, KV_HEADS), (attn.value, KV_HEADS))
    )
    key, value = (jnp.repeat(array, HEADS // KV_HEADS, axis=1) for array in (key, value))
    scores = jnp.einsum("bnth,bnsh->bnts", query, key) * SIZE**-0.5
    numbers = attn.token_scalars(x)
    if attn.token_scalars.cumulative:
        sums = jnp.cumsum(numbers, axis=2)
        scores = scores + sums[..., :, None] - sums[..., None, :]
    else:
        scores = scores * (1 - attn.token_scalars.strength[0, 0] * numbers[..., None])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
    heads = jnp.einsum("bnts,bnsh->bnth", weights, value)
    return attn.out(heads.swapaxes(1, 2).reshape(*x.shape[:2], -1))


CAUSAL = np.tri(LENGTH, dtype=bool)[None]


@pytest.mark.parametrize(
    ("kind", "num_heads", "options"),
    [
        (ForgetGate, HEADS, {"attention_type": "flash", "attention_block_size": 4}),
        (ForgetGate, 1, {"attention_type": "standard"}),
        (Temperature, HEADS, {"attention_type": "flash", "attention_block_size": 4}),
    ],
)
def test_numbers_of_tokens_are_exact_with_gradients(kind, num_heads, options):
    with jax.enable_x64(True):
        attn = attention(kind, num_heads, dtype="float64", **options)
        graphdef, params, rest = nnx.split(attn, nnx.Param, ...)
        x, cotangent = X, np.random.default_rng(2).normal(size=X.shape)

        @jax.jit
        def both(params, x):
            def loss(params, x, run):
                out = run(nnx.merge(graphdef, params, rest), x)
                return (out * cotangent).sum(), out

            runs = lambda attn, x: attn(x, mask=masks.causal()), lambda attn, x: formula(attn, x, CAUSAL)
            return [jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x, run) for run in runs]

        have, want = both(params, jnp.asarray(x))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12, rtol=1e-10), have, want)
        assert all((np.asarray(leaf) != 0).any() for leaf in jax.tree.leaves(want[0][0]["token_scalars"]))


PAGES = {"num_blocks": 8, "block_size": 4, "max_blocks_per_seq": 4, "num_kv_heads": KV_HEADS, "head_dim": SIZE}
ROW = 2, KV_HEADS, SIZE
CACHES = {  # the cache, its window and its sinks
    "contiguous": (lambda: init_kv_layer_cache(*ROW, 16), None, 0),
    "ring": (lambda: init_ring_kv_cache(*ROW, 16), None, 0),
    "paged": (lambda: init_paged_kv_cache(**PAGES, batch_size=2), None, 0),
    # Room for a window and the tokens of a call: later tokens take the slots of earlier ones.
    "window": (lambda: init_ring_kv_cache(*ROW, 5, window=3), 3, 0),
    "window and sinks": (lambda: init_ring_kv_cache(*ROW, 7, window=3, num_sinks=2), 3, 2),
}


@pytest.mark.parametrize(
    ("name", "kind", "num_heads"), [*((name, ForgetGate, HEADS) for name in CACHES), ("ring", Temperature, 1)]
)
def test_a_cache_gives_the_same_with_padding_and_tokens_taken_back(name, kind, num_heads):
    make, window, num_sinks = CACHES[name]
    near = masks.causal()
    if window is not None:
        near = near & (masks.sliding_window(window) | masks.first(num_sinks)) if num_sinks else near
    attn = attention(kind, num_heads, attention_window=None if num_sinks else window)
    x = jax.device_put(X.astype(np.float32))

    @nnx.jit
    def run(attn, cache):
        outs, cache, start = [], EmptyCache(cache), 0
        for end in (5, 8, 9):
            out, cache = attn(x[:, start:end], mask=near, position_ids_q=POSITIONS[:, start:end], kv_cache=cache)
            outs.append(out)
            start = end
        # Two tokens are drafted, and the second one is taken back.
        drafted = jnp.concatenate([x[:, 9:10], -x[:, 10:]], axis=1)
        out, cache = attn(drafted, mask=near, position_ids_q=POSITIONS[:, 9:], kv_cache=cache)
        cache = select_rows(forget(cache, POSITIONS[:, 10]), jnp.array([1, 0]))
        cache = grow(cache, 32, 4)
        last, _ = attn(x[::-1, 10:], mask=near, position_ids_q=POSITIONS[::-1, 10:], kv_cache=cache)
        whole = attn(x, mask=masks.at_positions(near, POSITIONS, POSITIONS), position_ids_q=POSITIONS)
        return jnp.concatenate([*outs, out[:, :1], last[::-1]], axis=1), whole

    have, whole = run(attn, init_scalar_cache(make(), num_heads))
    distance = POSITIONS[:, :, None] - POSITIONS[:, None]
    pairs = CAUSAL & REAL[:, None]
    if window is not None:
        pairs = pairs & ((distance < window) | (num_sinks >= POSITIONS + 1)[:, None])
    want = np.asarray(formula(attn, x, pairs | ~REAL[..., None]))[REAL]
    np.testing.assert_allclose(np.asarray(whole)[REAL], want, atol=3e-6)
    np.testing.assert_allclose(np.asarray(have)[REAL], want, atol=3e-6)


def test_running_sums_leave_padding_out():
    attn = attention()
    cache = init_scalar_cache(init_kv_layer_cache(*ROW, 16), HEADS)
    x = jax.device_put(X.astype(np.float32))
    _, cache = nnx.jit(lambda attn: attn(x, mask=masks.causal(), position_ids_q=POSITIONS, kv_cache=cache))(attn)
    numbers = np.asarray(attn.token_scalars(x))
    np.testing.assert_allclose(cache.scalars[0, :, :8], np.cumsum(numbers[0, :, 3:], axis=1), atol=1e-6)
    np.testing.assert_allclose(cache.last()[0], numbers[0, :, 3:].sum(1), atol=1e-6)
    assert init_scalar_cache(init_kv_layer_cache(*ROW, 16), 1).last().tolist() == [[0.0], [0.0]]


def scalar_ring(**options):
    return init_scalar_cache(init_ring_kv_cache(*ROW, 9, window=3), HEADS, **options)


def test_numbers_without_a_slot_are_refused_or_give_nan():
    attn, x = attention(attention_window=3), jax.device_put(X.astype(np.float32))
    cache = scalar_ring(num_positions=5)
    message = (
        "ScalarCache: the numbers of all attended tokens must fit into its slots; got positions up to 5 in 4 tokens"
    )
    _, cache = attn(x[:, :2], mask=masks.causal(), kv_cache=cache)
    with pytest.raises(ValueError, match=message):
        attn(x[:, 2:6], mask=masks.causal(), kv_cache=cache)
    out, lost = nnx.jit(lambda attn, cache: attn(x[:, 2:6], mask=masks.causal(), kv_cache=cache))(attn, cache)
    assert np.isnan(out).all() and lost.overflowed.all()
    full = init_scalar_cache(init_kv_layer_cache(*ROW, 9), HEADS, num_positions=3)
    with pytest.raises(ValueError, match="got positions up to 3 in 4 tokens, with 3 slots. Make it with more"):
        full.write(jnp.zeros((2, HEADS, 4)), jnp.arange(4)[None])


def test_tokens_that_are_taken_back_past_the_numbers_of_a_ring_give_nan():
    """The numbers hold what is attended after 3 tokens are taken back, the keys after 4."""
    cache = scalar_ring(num_positions=5)
    for position in range(8):
        positions, tokens = jnp.full((2, 1), position), jnp.ones((2, KV_HEADS, 1, SIZE))
        cache = cache.write(jnp.ones((2, HEADS, 1)), positions)
        inner, _ = cache.cache.append({"keys": tokens, "values": tokens}, positions)
        cache = dataclasses.replace(cache, cache=inner)
    assert forget(cache, np.array([5, 4])).overflowed.tolist() == [False, True]
    assert not forget(cache, np.array([4, 0])).cache.overflowed.any()  # so the keys alone do not tell
    twice = forget(forget(cache, np.array([6, 8])), np.array([4, 8]))
    assert twice.overflowed.tolist() == [True, False]
    anew = forget(cache, np.array([0, 0]))
    assert not anew.overflowed.any() and not anew.lost.any()


@pytest.mark.parametrize("num_sinks", [0, 2])
def test_a_longer_ring_keeps_the_numbers_of_the_last_tokens(num_sinks):
    inner = init_ring_kv_cache(*ROW, 9, window=3, num_sinks=num_sinks)
    cache, lengths = init_scalar_cache(inner, 1, num_positions=7), np.array([10, 4])
    for position in range(10):
        positions = jnp.where(jnp.asarray(position < lengths), position, -1)[:, None]
        cache = cache.write(jnp.full((2, 1, 1), position, jnp.float32), positions)
    held = np.where(np.arange(10) < lengths[:, None], np.arange(10), -1)[:, -9:].astype(np.int32)
    cache = dataclasses.replace(cache, cache=dataclasses.replace(inner, positions=jax.device_put(held)))
    longer = grow(cache, 12, 2)
    for row, length in enumerate(lengths):
        ring = 7 - num_sinks
        kept = [p for p in range(length) if p < num_sinks or p >= length - ring]
        found = longer.scalars[row, 0, longer.slots(np.array(kept))]
        np.testing.assert_array_equal(found, kept)
    assert longer.scalars.shape[2] == 12


def test_a_layer_and_its_cache_must_fit():
    bare = init_kv_layer_cache(*ROW, 16)
    x = jax.device_put(X.astype(np.float32))
    attn, plain = attention(), build(lambda rngs: MultiHeadAttention(rngs, **SIZES))
    for cache, got in ((bare, "KVLayerCache"), (init_scalar_cache(bare, 1), "ScalarCache with 1")):
        with pytest.raises(ValueError, match=f"token_scalars of 4 heads kv_cache must be a ScalarCache .* got {got}"):
            attn(x, kv_cache=EmptyCache(cache))
    with pytest.raises(
        ValueError, match="without token_scalars kv_cache must be no ScalarCache; got ScalarCache with 4"
    ):
        plain(x, kv_cache=init_scalar_cache(bare, HEADS))
    with pytest.raises(ValueError, match="token_scalars are for self-attention.*got context"):
        attn(x, context=x)
    with pytest.raises(ValueError, match="a ScalarCache must hold a cache .* stores tokens; got LinearLayerCache"):
        init_scalar_cache(init_linear_layer_cache(*ROW), 1, num_positions=3)
    with pytest.raises(ValueError, match="num_heads must be at least 1; got num_heads=0"):
        init_scalar_cache(bare, 0)


class Hiding(ForgetGate):
    def mod(self, scores, b, h, q, kv, of_query, of_key):
        return scores + ARRAY[h] * of_key


class Shapeless(ForgetGate):
    def __call__(self, x):
        return x


ARRAY = jax.device_put(np.ones(HEADS, np.float32))


def test_objects_that_are_no_token_scalars_are_refused():
    def make(scalars, **options):
        return nnx.eval_shape(lambda: MultiHeadAttention(nnx.Rngs(0), **SIZES, **options, token_scalars=scalars()))

    with pytest.raises(ValueError, match="token_scalars must be an nnx.Module with cumulative, __call__ and mod"):
        make(lambda: nnx.RMSNorm(3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"of shape \(batch, 4 or 1, length\); got \(1, 1, 12\)"):
        make(lambda: Shapeless(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="token_scalars must not hide arrays"):
        make(lambda: Hiding(nnx.Rngs(0)))
    for kind in ("linear", "lite"):
        with pytest.raises(ValueError, match=f"token_scalars change scores; got attention_type={kind}"):
            make(lambda: ForgetGate(nnx.Rngs(0)), attention_type=kind)
    ring = functools.partial(ring_attention, axis_name="sequence")
    with pytest.raises(NotImplementedError, match="a device of a ring knows those of its shard only"):
        make(lambda: ForgetGate(nnx.Rngs(0)), attention_fn=ring)


def test_a_block_takes_a_forgetting_layer():
    block = build(lambda rngs: EncoderBlock(rngs, **SIZES, d_ff=5, attention=attention()))
    x = jax.device_put(X.astype(np.float32))
    assert block.attention.scalar_heads == HEADS
    assert jax.eval_shape(lambda: block(x, mask=masks.causal())).shape == x.shape
