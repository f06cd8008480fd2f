"""Paged attention is standard attention to each row's tokens, wherever they lie and whatever lies around them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from attnax import MultiHeadAttention, masks, standard_attention
from attnax.kernels.paged import paged_attention
from attnax.masks import MaskedScoreMod
from attnax.paged_cache import (
    PagedKVCache,
    allocate_blocks,
    allocate_rows,
    append_kv,
    append_rows,
    gather_kv,
    init_paged_kv_cache,
)

HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, QUERIES = 6, 2, 5, 7, 5
LENGTHS = np.array([311, 0, 257, 3, 131])  # more than a chunk, nothing, one more than a chunk, fewer than the queries
BATCH, CAPACITY = len(LENGTHS), 331


@functools.cache
def texts():
    """Keys and values of each row's whole text, which is longer than what the cache holds."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((BATCH, KV_HEADS, CAPACITY, dim), np.float32) for dim in (KEY_DIM, VALUE_DIM)]


@functools.cache
def queries():
    return jax.random.normal(jax.random.key(1), (BATCH, HEADS, QUERIES, KEY_DIM))


def make_cache(key, value, lengths=LENGTHS, *, block_size=3, spare=11, elsewhere=np.nan):
    """The first tokens of each row in shuffled blocks; every other slot of the pools holds `elsewhere`."""
    counts = -(-np.asarray(lengths) // block_size)
    num_blocks, per_row = counts.sum() + spare, -(-key.shape[2] // block_size)
    blocks = np.random.default_rng(block_size).permutation(num_blocks)
    pools = [np.full((num_blocks, block_size, x.shape[1], x.shape[3]), elsewhere, np.float32) for x in (key, value)]
    table = np.full((len(lengths), per_row), -1, np.int32)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[row, :count], blocks = blocks[:count], blocks[count:]
        for t in range(length):
            for pool, text in zip(pools, (key, value), strict=True):
                pool[table[row, t // block_size], t % block_size] = text[row, :, t]
    overflowed = jnp.zeros(len(lengths), bool)
    return PagedKVCache(*map(jnp.asarray, (*pools, table, np.asarray(lengths, np.int32))), overflowed)


@functools.cache
def filled(block_size=3):
    return make_cache(*texts(), block_size=block_size)


def new_tokens(text, num=QUERIES):
    """The tokens of each row behind those in the cache."""
    return jnp.stack([text[row, :, length : length + num] for row, length in enumerate(LENGTHS)])


def expected(query, starts, ends, mask=None, score_mod=None, **options):
    """Standard attention to each row's first `ends` tokens, the queries being at `starts` and behind."""
    starts, ends = jnp.asarray(starts), jnp.asarray(ends)
    if mask is not None:
        mask = masks.as_mask(mask)

    def keep(b, h, q, kv):
        q = q + starts[b]
        exists = kv < ends[b]
        return exists if mask is None else exists & mask(b, h, q, kv) & (q >= 0)

    def mod(scores, b, h, q, kv):
        return score_mod(scores, b, h, q + starts[b], kv)

    mod = None if score_mod is None else mod
    return standard_attention(query, *map(jnp.asarray, texts()), mask=keep, score_mod=mod, return_lse=True, **options)


def by_row(query, cache, **options):
    rows = [paged_attention(x, cache, row, **options) for row, x in enumerate(query)]
    return [jnp.stack(x) for x in zip(*rows, strict=True)]


def as_attention_fn(query, cache, **options):
    attention_fn = functools.partial(paged_attention, cache=cache)
    return attention_fn(query, *map(new_tokens, texts()), **options)


FORMS = {  # call(query, cache, **options), whether the queries are in the cache already
    "one row": (by_row, True),
    "all rows": (paged_attention, True),
    "attention_fn": (as_attention_fn, False),
}
forms = pytest.mark.parametrize("form", FORMS)


def call(form, query, cache, **options):
    return FORMS[form][0](query, cache, return_lse=True, **options)


def spans(form):
    """(starts, ends) of the form."""
    return (LENGTHS - QUERIES, LENGTHS) if FORMS[form][1] else (LENGTHS, LENGTHS + QUERIES)


def alibi(scores, b, h, q, kv):
    return scores - 0.03 * (h + 1) * abs(q - kv)


def checker(b, h, q, kv):
    return (q + kv + h + b) % 3 > 0


DENSE = np.indices((BATCH, 1, CAPACITY + 2, CAPACITY + 2)).sum(0) % 5 > 1  # max_len is 333 with blocks of 3

CASES = {
    "everything": {},
    "causal": {"mask": masks.causal()},
    "window": {"mask": masks.sliding_window(7)},
    "window, both sides": {"mask": masks.sliding_window(7, causal=False), "score_mod": alibi},
    "padding": {"mask": masks.padding(jnp.array([301, 2, 5, 0, 130])) & masks.causal()},
    "function": {"mask": checker},
    "score mod": {"score_mod": alibi},
    "masked score mod": {"score_mod": MaskedScoreMod(alibi, masks.causal()), "mask": checker},
    "scale": {"scale": 0.7, "mask": ~masks.sliding_window(131)},
}


def agree(actual, wanted):
    for have, want in zip(actual, wanted, strict=True):
        assert have.shape == want.shape
        np.testing.assert_allclose(have, want, rtol=2e-6, atol=2e-6)


def count_visits(options, lengths, cache, query):
    """How often the score mod is computed: once for each chunk that is read."""
    visits = []

    def mod(scores, b, h, q, kv):
        jax.debug.callback(lambda: visits.append(1))
        return scores

    @jax.jit
    def run(query, cache):
        return paged_attention(query, cache, score_mod=mod, **options)

    counts = []
    for length in lengths:
        del visits[:]
        run(query, dataclasses.replace(cache, seq_lengths=jnp.asarray(length, jnp.int32))).block_until_ready()
        jax.effects_barrier()
        counts.append(len(visits))
    assert run._cache_size() == 1
    return counts


@forms
@pytest.mark.parametrize("case", CASES)
def test_every_form_equals_standard_attention_at_true_positions(form, case):
    wanted = expected(queries(), *spans(form), **CASES[case])
    agree(call(form, queries(), filled(), **CASES[case]), wanted)


@forms
@pytest.mark.parametrize("block_size", [1, 8, 331])
def test_block_size_does_not_matter(form, block_size):
    options = {"mask": masks.causal(), "score_mod": alibi}
    agree(call(form, queries(), filled(block_size), **options), call(form, queries(), filled(3), **options))


@pytest.mark.parametrize("form", ["one row", "all rows"])
def test_a_boolean_array_knows_every_position_of_the_cache(form):
    agree(call(form, queries(), filled(), mask=DENSE), expected(queries(), *spans(form), mask=jnp.asarray(DENSE)))
    columns = DENSE[:, :, :1]
    agree(call(form, queries(), filled(), mask=columns), expected(queries(), *spans(form), mask=jnp.asarray(columns)))


@pytest.mark.parametrize("num_queries", [0, 1, 263])
def test_any_number_of_queries(num_queries):
    query = jax.random.normal(jax.random.key(3), (BATCH, HEADS, num_queries, KEY_DIM))
    actual = paged_attention(query, filled(), mask=masks.causal(), return_lse=True)
    agree(actual, expected(query, LENGTHS - num_queries, LENGTHS, mask=masks.causal()))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_new_tokens_of_more_than_one_chunk_follow_the_cache(kv_heads):
    lengths, num_new = np.array([7, 0]), 263
    key, value = (jax.random.normal(jax.random.key(dim), (2, kv_heads, 271, dim)) for dim in (KEY_DIM, VALUE_DIM))
    query = jax.random.normal(jax.random.key(2), (2, HEADS, num_new, KEY_DIM))
    fresh = [jnp.stack([x[row, :, n : n + num_new] for row, n in enumerate(lengths)]) for x in (key, value)]
    cache = make_cache(np.asarray(key), np.asarray(value), lengths)
    for mask in (masks.causal(), None):
        out = paged_attention(query, *fresh, cache=cache, mask=mask)
        for row, n in enumerate(lengths):
            text = [x[row : row + 1, :, : n + num_new] for x in (key, value)]
            shifted = None if mask is None else masks.at_positions(mask, n + np.arange(num_new), np.arange(n + num_new))
            agree(out[row : row + 1], standard_attention(query[row : row + 1], *text, mask=shifted))


def test_documented_block():
    num_kv_heads, head_dim = 4, 16
    paged = init_paged_kv_cache(
        num_blocks=16, block_size=8, num_kv_heads=num_kv_heads, head_dim=head_dim,
        batch_size=2, max_blocks_per_seq=4, dtype=jnp.float32,
    )  # fmt: skip
    free = jnp.arange(16, dtype=jnp.int32)
    for seq_idx, n_tokens in enumerate([12, 5]):
        paged, used = allocate_blocks(paged, sequence_idx=seq_idx, num_new_tokens=n_tokens, free_block_ids=free)
        free = free[used:]
        keys = jax.random.normal(jax.random.key(seq_idx), (n_tokens, num_kv_heads, head_dim))
        values = jax.random.normal(jax.random.key(seq_idx + 100), (n_tokens, num_kv_heads, head_dim))
        paged = append_kv(paged, sequence_idx=seq_idx, keys_new=keys, values_new=values)

    q = jax.random.normal(jax.random.key(42), (4, 1, head_dim))
    for seq_idx in range(2):
        keys, values, _ = gather_kv(paged, seq_idx)
        wanted = standard_attention(q[None], keys.swapaxes(0, 1)[None], values.swapaxes(0, 1)[None])[0]
        assert wanted.shape == (4, 1, 16)
        agree(paged_attention(q, paged, sequence_idx=seq_idx)[None], wanted[None])


def test_cached_prefill_in_any_chunks_equals_the_whole():
    text = [jnp.asarray(x[:, :, :29]) for x in texts()]
    query = jax.random.normal(jax.random.key(5), (BATCH, HEADS, 29, KEY_DIM))
    whole = standard_attention(query, *text, mask=masks.causal(), score_mod=alibi)
    cache = init_paged_kv_cache(
        num_blocks=53, block_size=3, num_kv_heads=KV_HEADS, head_dim=KEY_DIM, value_dim=VALUE_DIM,
        batch_size=BATCH, max_blocks_per_seq=11,
    )  # fmt: skip
    start, outputs = 0, []
    for size in (11, 1, 17):
        chunk = slice(start, start + size)
        cache = append_rows(allocate_rows(cache, size), *(x[:, :, chunk] for x in text))
        outputs.append(paged_attention(query[:, :, chunk], cache, mask=masks.causal(), score_mod=alibi))
        start += size
    agree([jnp.concatenate(outputs, axis=2)], [whole])


@pytest.mark.parametrize("use_rope", [False, True])
def test_a_layer_over_the_cache_equals_the_layer_on_the_whole_sequence(use_rope):
    lengths, num_new = np.array([13, 0, 5]), 3
    layer = MultiHeadAttention(
        nnx.Rngs(0), num_heads=6, num_kv_heads=2, in_features=11, qkv_features=24, use_rope=use_rope
    )
    x = jax.random.normal(jax.random.key(0), (3, 17, 11))
    whole = layer(x, mask=masks.causal(), score_mod=alibi)

    split = lambda x: x.reshape(3, 17, 2, 4).swapaxes(1, 2)
    key, value = split(layer.key(x)), split(layer.value(x))
    if use_rope:
        key = layer.rope(key)
    cache = make_cache(np.asarray(key), np.asarray(value), lengths)
    positions = lengths[:, None] + np.arange(num_new)[None]
    graph, state = nnx.split(layer)

    @jax.jit
    def step(state, cache, x, positions):
        layer = nnx.merge(graph, state)
        layer.attention_fn = functools.partial(paged_attention, cache=cache)
        return layer(x, mask=masks.causal(), score_mod=alibi, position_ids_q=positions)

    fresh = jnp.take_along_axis(x, jnp.asarray(positions)[:, :, None], axis=1)
    wanted = jnp.take_along_axis(whole, jnp.asarray(positions)[:, :, None], axis=1)
    np.testing.assert_allclose(step(state, cache, fresh, positions), wanted, atol=1e-5)


@forms
def test_what_lies_in_other_slots_has_no_effect(form):
    """The caches of all tests hold NaN there; a cache with 0 gives the same bits."""
    clean = make_cache(*texts(), elsewhere=0.0)
    for have, want in zip(*(call(form, queries(), x, mask=checker) for x in (filled(), clean)), strict=True):
        np.testing.assert_array_equal(have, want)
        assert not np.isnan(have).any()


@forms
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
def test_nan_in_a_token_reaches_only_the_rows_that_may_attend_it(form, bad, which):
    cache = filled()
    mask = lambda b, h, q, kv: (kv + q) % 2 == 0
    pools = [cache.key_pool, cache.value_pool]
    block = cache.block_table[0, 257 // 3]
    pools[which] = pools[which].at[block, 257 % 3, 1, 2].set(bad)
    clean = call(form, queries(), cache, mask=mask)
    spoiled = call(form, queries(), dataclasses.replace(cache, key_pool=pools[0], value_pool=pools[1]), mask=mask)
    reached = np.zeros((BATCH, HEADS, QUERIES), bool)
    reached[0, 3:] = (spans(form)[0][0] + np.arange(QUERIES)) % 2 == 1  # kv head 1 serves heads 3, 4, 5
    for have, want in zip(spoiled, clean, strict=True):
        assert np.isnan(have[reached]).all()
        np.testing.assert_array_equal(have[~reached], want[~reached])


def test_nan_in_a_new_token_reaches_only_the_rows_that_may_attend_it():
    key, value = map(new_tokens, texts())
    run = functools.partial(paged_attention, queries(), cache=filled(), mask=masks.causal())
    out, clean = run(key, value.at[4, 0, 2].set(np.nan)), run(key, value)
    assert np.isnan(out[4, :3, 2:]).all()
    reached = np.isnan(out)
    assert reached.sum() == 3 * 3 * VALUE_DIM
    np.testing.assert_array_equal(out[~reached], clean[~reached])


@pytest.mark.parametrize("form", ["one row", "all rows"])
def test_a_row_without_tokens_gives_exactly_zero(form):
    out, lse = call(form, queries(), filled())
    assert (out[1] == 0).all() and np.isneginf(lse[1]).all()
    assert (out[0] != 0).any() and np.isfinite(np.delete(lse, 1, axis=0)).all()


@forms
def test_an_overflowed_row_gives_nan(form):
    cache = dataclasses.replace(filled(), overflowed=jnp.arange(BATCH) == 2)
    for have, want in zip(call(form, queries(), cache), call(form, queries(), filled()), strict=True):
        assert np.isnan(have[2]).all()
        np.testing.assert_array_equal(np.delete(have, 2, axis=0), np.delete(want, 2, axis=0))


@pytest.mark.parametrize("row", [-1, BATCH])
def test_a_traced_index_of_no_row_gives_nan(row):
    run = jax.jit(lambda query, row: paged_attention(query, filled(), row))
    assert np.isnan(run(queries()[0], row)).all()
    assert not np.isnan(run(queries()[0], 1)).any()


def test_tokens_in_no_block_are_not_attended():
    cache = filled()
    cut = dataclasses.replace(cache, block_table=cache.block_table.at[:, 11:].set(-1))
    short = dataclasses.replace(cut, seq_lengths=jnp.minimum(cache.seq_lengths, 33))
    agree(paged_attention(queries(), cut, return_lse=True), paged_attention(queries(), short, return_lse=True))


@forms
def test_compiled_equals_eager(form):
    run = functools.partial(call, form, mask=masks.sliding_window(7), score_mod=alibi)
    agree(jax.jit(run)(queries(), filled()), run(queries(), filled()))


def other_cache(seed):
    lengths = np.random.default_rng(seed).integers(0, 301, BATCH)
    cache = make_cache(*texts(), lengths, spare=100)
    grow = [(0, 700 - cache.key_pool.shape[0]), (0, 0), (0, 0), (0, 0)]
    return dataclasses.replace(
        cache, key_pool=jnp.pad(cache.key_pool, grow), value_pool=jnp.pad(cache.value_pool, grow)
    )


def test_other_lengths_tables_and_rows_compile_nothing_new(count_compilations):
    for seed in range(4):
        cache = other_cache(seed)
        del count_compilations[seed and len(count_compilations) :]
        before = len(count_compilations)
        # Rebuilt functions that do the same are the same.
        mask = lambda b, h, q, kv: kv % 7 < 5
        mod = lambda scores, b, h, q, kv: scores * jnp.cos(0.1 * kv)
        paged_attention(queries(), cache, mask=mask, score_mod=mod)
        paged_attention(queries()[seed], cache, seed, mask=masks.causal())
        paged_attention(queries(), *map(new_tokens, texts()), cache=cache, mask=masks.causal())
        assert seed == 0 or len(count_compilations) == before


def test_under_jit_the_chunks_in_use_are_read_and_no_others():
    """Capacity is 5 chunks of 255 tokens."""
    key, value = (jnp.zeros((2, 1, 1201, dim)) for dim in (3, 2))
    cache = make_cache(np.asarray(key), np.asarray(value), [1201, 1201])
    query = jnp.ones((2, 1, 1, 3))
    lengths = [(0, 0), (1, 0), (255, 3), (3, 256), (700, 0), (1201, 1201)]
    assert count_visits({}, lengths, cache, query) == [0, 1, 1, 2, 3, 5]
    assert count_visits({"mask": masks.sliding_window(7)}, lengths, cache, query) == [0, 1, 1, 2, 1, 1]
    assert count_visits({"mask": lambda b, h, q, kv: q - kv < 300}, lengths, cache, query) == [0, 1, 1, 2, 3, 2]


@forms
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_computes_in_float32(form, dtype):
    """The result is that of float32 on the rounded numbers, rounded once; the lse stays float32."""
    rounded = lambda x: x.astype(dtype)
    cache = dataclasses.replace(filled(), key_pool=rounded(filled().key_pool), value_pool=rounded(filled().value_pool))
    new = () if FORMS[form][1] else [rounded(new_tokens(x)) for x in texts()]
    run = (
        by_row
        if form == "one row"
        else lambda query, cache, **options: paged_attention(query, *new, cache=cache, **options)
    )
    out, lse = run(rounded(queries()), cache, mask=masks.causal(), return_lse=True)
    assert out.dtype == dtype and lse.dtype == jnp.float32

    new = [x.astype(jnp.float32) for x in new]
    exact, exact_lse = run(rounded(queries()).astype(jnp.float32), cache, mask=masks.causal(), return_lse=True)
    assert exact.dtype == jnp.float32  # the pool is cast to the query's precision
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        out.astype(jnp.float32), exact, rtol=2 * jnp.finfo(dtype).eps, atol=float(jnp.finfo(dtype).smallest_normal)
    )


@forms
def test_dropout_is_that_of_standard_attention_at_positions(form):
    """In row 2 the bits are those of (b, h, q, kv) at true positions."""
    options = {"dropout_rng": jax.random.key(7), "dropout_rate": 0.3, "deterministic": False}
    out, lse = call(form, queries(), filled(), **options)
    start, end = (int(x[2]) for x in spans(form))
    padded = (
        jnp.zeros((BATCH, HEADS, end, KEY_DIM)).at[:, :, start : start + QUERIES].set(queries()[:, :, : end - start])
    )
    text = [jnp.asarray(x[:, :, :end]) for x in texts()]
    wanted, wanted_lse = standard_attention(padded, *text, return_lse=True, **options)
    agree((out[2], lse[2]), (wanted[2, :, start:], wanted_lse[2, :, start:]))
    plain, _ = call(form, queries(), filled())
    assert not np.allclose(out[2], plain[2], atol=1e-3)
    kept, _ = call(form, queries(), filled(), **options | {"deterministic": True})
    np.testing.assert_array_equal(kept, plain)


def test_nan_from_a_score_mod_is_seen_where_it_is_attended_and_nowhere_else():
    run = functools.partial(paged_attention, queries(), filled(), mask=masks.padding(jnp.array([300, 9, 9, 9, 131])))
    out = run(score_mod=lambda scores, b, h, q, kv: jnp.where(kv >= 300, jnp.nan, scores))
    assert not np.isnan(out).any()
    out = run(score_mod=lambda scores, b, h, q, kv: jnp.where((kv >= 130) & (h == 2), jnp.nan, scores))
    assert np.isnan(out[np.array([0, 4]), 2]).all()
    assert not np.isnan(np.delete(out, 2, axis=1)).any() and not np.isnan(out[1:4]).any()


def test_arrays_that_a_mod_captures_are_read_within_their_bounds():
    bias = jnp.arange(311.0) * 0.01

    def mod(scores, b, h, q, kv):
        return scores + bias.at[kv].get(mode="fill", fill_value=jnp.nan)

    wanted = expected(queries(), *spans("all rows"), score_mod=mod)
    agree(paged_attention(queries(), filled(), score_mod=mod, return_lse=True), wanted)


def test_vmap_over_rows_equals_the_batched_form():
    run = lambda query, row: paged_attention(query, filled(), row, mask=masks.causal(), score_mod=alibi)
    mapped = jax.vmap(run)(queries(), jnp.arange(BATCH))
    agree([mapped], [paged_attention(queries(), filled(), mask=masks.causal(), score_mod=alibi)])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_heads_may_be_split_over_devices(axis_type):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(axis_type,))
    pool, heads = PartitionSpec(None, None, "model"), PartitionSpec(None, "model")
    specs = PagedKVCache(pool, pool, PartitionSpec(), PartitionSpec(), PartitionSpec())
    slopes = jnp.linspace(0.01, 0.1, HEADS)

    def run(query, key, value, cache, slopes, attention=paged_attention):
        mod = lambda scores, b, h, q, kv: scores - slopes[h] * abs(q - kv)
        in_cache = attention(query, cache, mask=masks.causal(), score_mod=mod)
        return in_cache + attention(query, key, value, cache=cache, mask=masks.causal(), score_mod=mod)

    arguments = queries(), *map(new_tokens, texts()), filled(), slopes
    in_specs = heads, heads, heads, specs, PartitionSpec("model")
    place = lambda spec, x: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    is_spec = lambda x: isinstance(x, PartitionSpec)
    placed = jax.tree.map(place, in_specs, arguments, is_leaf=is_spec)
    split = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=heads))
    agree([split(*placed)], [run(*arguments)])


REVERSE = {
    "query": lambda x, cache: paged_attention(queries() * x, cache),
    "key pool": lambda x, cache: paged_attention(queries(), dataclasses.replace(cache, key_pool=cache.key_pool * x)),
    "value pool": lambda x, cache: paged_attention(
        queries(), dataclasses.replace(cache, value_pool=cache.value_pool * x)
    ),
    "scale": lambda x, cache: paged_attention(queries(), cache, scale=x),
    "captured array": lambda x, cache: paged_attention(queries(), cache, score_mod=lambda s, b, h, q, kv: s * x),
    "new key": lambda x, cache: paged_attention(
        queries(), new_tokens(texts()[0]) * x, new_tokens(texts()[1]), cache=cache
    ),
    "new value": lambda x, cache: paged_attention(
        queries(), new_tokens(texts()[0]), new_tokens(texts()[1]) * x, cache=cache
    ),
}


@pytest.mark.parametrize("through", REVERSE)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "compiled"])
def test_reverse_mode_raises(through, transform):
    run = transform(lambda x: REVERSE[through](x, filled()).sum())
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(run)(jnp.float32(1.0))


@forms
def test_forward_mode_is_that_of_standard_attention(form):
    step = jax.random.normal(jax.random.key(9), queries().shape)
    options = {"mask": masks.causal(), "score_mod": alibi}
    wanted = jax.jvp(lambda x: expected(x, *spans(form), **options)[0], (queries(),), (step,))
    actual = jax.jvp(lambda x: call(form, x, filled(), **options)[0], (queries(),), (step,))
    agree(actual, wanted)


def changed(**fields):
    return dataclasses.replace(filled(), **fields)


Q = np.zeros((BATCH, HEADS, QUERIES, KEY_DIM), np.float32)
KEY, VALUE = (
    np.zeros((BATCH, KV_HEADS, QUERIES, KEY_DIM), np.float32),
    np.zeros((BATCH, KV_HEADS, QUERIES, VALUE_DIM), np.float32),
)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: paged_attention(Q), r"it is called with \(query, cache\), .*; got \(\) behind query, cache=NoneType"),
        (
            lambda: paged_attention(Q, KEY, VALUE),
            r"it is called with .*; got \(ndarray, ndarray\) behind query, cache=N",
        ),
        (lambda: paged_attention(Q, filled(), 0, 0), r"got \(PagedKVCache, int, int\) behind query"),
        (lambda: paged_attention(Q, filled(), 1, sequence_idx=2), r"got \(PagedKVCache, int\) .* sequence_idx=2"),
        (lambda: paged_attention(Q, filled(), cache=filled()), r"got \(PagedKVCache\) .* cache=PagedKVCache"),
        (lambda: paged_attention(Q, KEY, VALUE, cache=filled(), sequence_idx=0), r"sequence_idx=0"),
        (
            lambda: paged_attention(Q, filled(), 0),
            r"query must be \(num_heads, seq_q, head_dim\) of one row.*got .*=\(5",
        ),
        (lambda: paged_attention(Q[0], filled()), r"query must be \(batch, num_heads, seq_q, head_dim\) of all rows"),
        (lambda: paged_attention(Q[0], filled(), 5), "sequence_idx must be an integer between 0 and 4; got .*=5"),
        (lambda: paged_attention(Q[0], filled(), -1), "between 0 and 4; got sequence_idx=-1"),
        (lambda: paged_attention(Q[0], filled(), 1.0), "sequence_idx must be an integer .*; got sequence_idx=1.0"),
        (lambda: paged_attention(Q[0], filled(), np.arange(2)), "sequence_idx must be an integer .*; got .*=.0 1."),
        (
            lambda: paged_attention(Q[:3], filled()),
            r"must have the 5 rows of the cache; got query.shape=\(3, 6, 5, 5\)",
        ),
        (
            lambda: paged_attention(Q[..., :3], filled()),
            r"head_dim of the cache; got query.shape=.* 3\), key_pool.shape=",
        ),
        (lambda: paged_attention(Q[:, :5], filled()), "query heads must be a multiple of .* key heads .*; got 5 and 2"),
        (lambda: paged_attention(Q[:, :0], filled()), "query heads must be a multiple of .* key heads .*; got 0 and 2"),
        (lambda: paged_attention(Q.astype(int), filled()), "must be floating; got int32, float32 and float32"),
        (
            lambda: paged_attention(Q, changed(key_pool=filled().key_pool.astype(jnp.int8))),
            "must be floating; got float32, int8 and float32",
        ),
        (
            lambda: paged_attention(Q, KEY[:, :, :3], VALUE[:, :, :3], cache=filled()),
            r"key and value must hold the tokens of query, .*\(5, 2, 5, 5\) and \(5, 2, 5, 7\); got key.shape=\(5, 2, 3",
        ),
        (lambda: paged_attention(Q, KEY, KEY, cache=filled()), r"got .*, value.shape=\(5, 2, 5, 5\)"),
        (lambda: paged_attention(Q, KEY[:, :1], VALUE, cache=filled()), r"got key.shape=\(5, 1, 5, 5\)"),
        (
            lambda: paged_attention(Q, KEY.astype(jnp.bfloat16), VALUE, cache=filled()),
            "query, key and value must have one floating dtype; got float32, bfloat16, float32",
        ),
        (
            lambda: paged_attention(Q, KEY, VALUE, cache=filled(), mask=np.ones((5, 5), bool)),
            r"positions, those of the cache included: mask must broadcast to .*=\(5, 6, 338, 338\); got .*=\(5, 5\)",
        ),
        (
            lambda: paged_attention(Q, filled(), mask=masks.documents(np.arange(311))),
            "positions, those of the cache included: documents need one id a token",
        ),
        (lambda: paged_attention(Q, filled(), mask=np.ones((1, 1))), "mask must be boolean, .*; got mask.dtype=float"),
        (
            lambda: paged_attention(Q, filled(), mask="causal"),
            "mask must be a boolean array, a Mask or a function; got",
        ),
        (lambda: paged_attention(Q, filled(), score_mod=1), "score_mod must be a function"),
        (
            lambda: paged_attention(Q, filled(), score_mod=lambda s, b, h, q, kv: s.sum(-1)),
            "score_mod must return scores of the shape that it is given; got",
        ),
        (lambda: paged_attention(Q, filled(), scale=np.ones(2)), "scale must be one number; got"),
        (lambda: paged_attention(Q, filled(), dropout_rate=1.0), "dropout_rate must be at least 0 and below 1; got"),
        (
            lambda: paged_attention(Q, filled(), dropout_rate=0.1, deterministic=False),
            "dropout needs a key; got dropout_rate=0.1",
        ),
    ],
)
def test_wrong_input_is_refused_in_words(run, words):
    with pytest.raises(ValueError, match=f"paged_attention.*{words}"):
        run()


def test_it_takes_mask_objects_through_partial():
    attention_fn = functools.partial(paged_attention, cache=filled())
    assert masks.mask_argument("test", attention_fn, masks.causal(), (5, 6, 5, 5)) == masks.causal()
