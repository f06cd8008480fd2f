"""Paged attention is standard attention to each row's tokens, in any pages and beside any other contents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax import export
from jax.sharding import AxisType, PartitionSpec

from attnax import MultiHeadAttention, masks, standard_attention
from attnax.kernels._core.dropout import dropout_words, keep_weights
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
from attnax.paged_cache.chunks import pages_in_chunk
from attnax.pytrees import pytree_dataclass

HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, QUERIES = 6, 2, 5, 7, 5
LENGTHS = np.array([311, 0, 257, 3, 131])  # more than a chunk, nothing, one more than a chunk, fewer than the queries
BATCH, CAPACITY = len(LENGTHS), 331


@functools.cache
def texts():
    """Keys and values of each row's whole text, which is longer than the part in the cache."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((BATCH, KV_HEADS, CAPACITY, dim), np.float32) for dim in (KEY_DIM, VALUE_DIM)]


@functools.cache
def queries():
    return jax.device_put(np.random.default_rng(1).standard_normal((BATCH, HEADS, QUERIES, KEY_DIM), np.float32))


def make_cache(key, value, lengths=LENGTHS, *, block_size=3, spare=11, elsewhere=np.nan):
    """The first tokens of each row in shuffled blocks; every other slot of the pools holds `elsewhere`."""
    counts = -(-np.asarray(lengths) // block_size)
    num_blocks, per_row = counts.sum() + spare, -(-key.shape[2] // block_size)
    blocks = np.random.default_rng(block_size).permutation(num_blocks)
    pools = [np.full((num_blocks, x.shape[1], block_size, x.shape[3]), elsewhere, np.float32) for x in (key, value)]
    table = np.full((len(lengths), per_row), -1, np.int32)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[row, :count], blocks = blocks[:count], blocks[count:]
        for t in range(length):
            for pool, text in zip(pools, (key, value), strict=True):
                pool[table[row, t // block_size], :, t % block_size] = text[row, :, t]
    overflowed = jax.device_put(np.zeros(len(lengths), bool))
    return PagedKVCache(*map(jnp.asarray, (*pools, table, np.asarray(lengths, np.int32))), overflowed)


@functools.cache
def filled(block_size=3):
    return make_cache(*texts(), block_size=block_size)


def new_tokens(text, num=QUERIES):
    """The tokens of each row that follow its tokens in the cache."""
    return jax.device_put(np.stack([text[row, :, length : length + num] for row, length in enumerate(LENGTHS)]))


def expected(query, starts, ends, mask=None, score_mod=None, text=None, **options):
    """(out, lse) in float64 over each row's first `ends` tokens, with the queries from `starts` on."""
    starts, ends = np.asarray(starts), np.asarray(ends)
    key, value = texts() if text is None else map(np.asarray, text)
    b, h, q, kv = np.indices((*query.shape[:3], key.shape[2]), sparse=True)
    q = q + starts[:, None, None, None]
    keep = kv < ends[:, None, None, None]
    if mask is not None:
        keep = keep & np.asarray(masks.as_mask(mask)(b, h, q, kv)) & (q >= 0)
    mod = None if score_mod is None else lambda s, b, h, q, kv: np.asarray(score_mod(s, b, h, q + starts[b], kv))
    return oracle.attention(query, key, value, keep=keep, score_mod=mod, **options)


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
batched_forms = pytest.mark.parametrize("form", ["all rows", "attention_fn"])


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
    "causal & score mod": {"mask": masks.causal(), "score_mod": alibi},
    "window": {"mask": masks.sliding_window(7)},
    "padding": {"mask": masks.padding(np.array([301, 2, 5, 0, 130])) & masks.causal()},
    "function": {"mask": checker},
    "scale & far keys": {"scale": 0.7, "mask": ~masks.sliding_window(131, causal=False)},
}
# Other tests use the options of a case where they can, so that a compiled program serves again.
CAUSAL = CASES["causal & score mod"]


def agree(actual, wanted):
    for have, want in zip(actual, wanted, strict=True):
        assert have.shape == want.shape
        np.testing.assert_allclose(have, want, rtol=2e-6, atol=2e-6)


@forms
def test_an_array_is_about_the_queries_and_the_first_positions(form):
    array, (starts, ends) = np.random.default_rng(2).random((BATCH, 1, QUERIES, 140)) < 0.5, spans(form)

    def mask(b, h, q, kv):
        return (kv < 140) & array[b, 0, q - starts[b], np.minimum(kv, 139)]

    agree(call(form, queries(), filled(), mask=array), expected(queries(), starts, ends, mask=mask))


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


def mark_of(form, case):
    if (form, case) == ("all rows", "causal & score mod"):
        return []
    return [pytest.mark.thorough if form == "one row" and case != "function" else pytest.mark.contract]


@pytest.mark.parametrize(
    ("form", "case"),
    [pytest.param(form, case, marks=mark_of(form, case)) for form in FORMS for case in CASES],
)
def test_every_form_equals_standard_attention_at_true_positions(form, case):
    actual = jax.jit(functools.partial(call, form, **CASES[case]))(queries(), filled())
    agree(actual, expected(queries(), *spans(form), **CASES[case]))


@pytest.mark.thorough
@forms
def test_a_mask_carried_by_a_score_mod_is_a_mask(form):
    carried = call(form, queries(), filled(), score_mod=MaskedScoreMod(alibi, masks.causal()))
    agree(carried, call(form, queries(), filled(), **CAUSAL))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("form", "block_size"), [("one row", 1), ("all rows", 1), ("all rows", 8), ("all rows", 331), ("attention_fn", 8)]
)
def test_block_size_does_not_matter(form, block_size):
    agree(call(form, queries(), filled(block_size), **CAUSAL), call(form, queries(), filled(3), **CAUSAL))


@pytest.mark.thorough
@pytest.mark.parametrize(("form", "mask"), [("all rows", DENSE), ("one row", DENSE[:, :, :1])], ids=["pairs", "keys"])
def test_a_boolean_array_knows_every_position_of_the_cache(form, mask):
    agree(call(form, queries(), filled(), mask=mask), expected(queries(), *spans(form), mask=mask))


@pytest.mark.thorough
@pytest.mark.parametrize("num_queries", [0, 263])
def test_any_number_of_queries(num_queries):
    query = jax.random.normal(jax.random.key(3), (BATCH, HEADS, num_queries, KEY_DIM))
    actual = paged_attention(query, filled(), mask=masks.causal(), return_lse=True)
    agree(actual, expected(query, LENGTHS - num_queries, LENGTHS, mask=masks.causal()))


@pytest.mark.thorough
@pytest.mark.parametrize(("kv_heads", "mask"), [(1, masks.causal()), (6, None)], ids=["causal", "everything"])
def test_new_tokens_of_more_than_one_chunk_follow_the_cache(kv_heads, mask):
    lengths, num_new = np.array([7, 0]), 263
    rng = np.random.default_rng(0)
    text = [rng.standard_normal((2, kv_heads, 271, dim), np.float32) for dim in (KEY_DIM, VALUE_DIM)]
    query = rng.standard_normal((2, HEADS, num_new, KEY_DIM), np.float32)
    fresh = [np.stack([x[row, :, n : n + num_new] for row, n in enumerate(lengths)]) for x in text]
    actual = paged_attention(query, *fresh, cache=make_cache(*text, lengths), mask=mask, return_lse=True)
    agree(actual, expected(query, lengths, lengths + num_new, mask=mask, text=text))


@pytest.mark.thorough
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
    assert paged_attention(q, paged, sequence_idx=0).shape == (4, 1, 16)
    for seq_idx in range(2):
        keys, values = (np.asarray(x).swapaxes(0, 1)[None] for x in gather_kv(paged, seq_idx)[:2])
        wanted, _ = oracle.attention(q[None], keys, values)
        agree([paged_attention(q, paged, sequence_idx=seq_idx)], wanted)


@pytest.mark.thorough
def test_cached_prefill_in_any_chunks_equals_the_whole():
    text = [x[:, :, :29] for x in texts()]
    query = np.random.default_rng(5).standard_normal((BATCH, HEADS, 29, KEY_DIM), np.float32)
    cache = init_paged_kv_cache(
        num_blocks=53, block_size=3, num_kv_heads=KV_HEADS, head_dim=KEY_DIM, value_dim=VALUE_DIM,
        batch_size=BATCH, max_blocks_per_seq=11,
    )  # fmt: skip

    @jax.jit
    def step(cache, query, key, value):
        cache = append_rows(allocate_rows(cache, query.shape[2]), key, value)
        return cache, paged_attention(query, cache, mask=masks.causal(), score_mod=alibi)

    start, outputs = 0, []
    for size in (11, 1, 17):
        cache, out = step(cache, *(x[:, :, start : start + size] for x in (query, *text)))
        start, outputs = start + size, [*outputs, out]
    wanted, _ = oracle.attention(query, *text, keep=np.tri(29, dtype=bool), score_mod=alibi)
    agree([np.concatenate(outputs, axis=2)], [wanted])


@pytest.mark.thorough
def test_a_layer_over_the_cache_equals_the_layer_on_the_whole_sequence():
    lengths, num_new = np.array([13, 0, 5]), 3
    layer = MultiHeadAttention(nnx.Rngs(0), num_heads=6, num_kv_heads=2, in_features=11, qkv_features=24, use_rope=True)
    x = jax.random.normal(jax.random.key(0), (3, 17, 11))

    split = lambda x: x.reshape(3, 17, 2, 4).swapaxes(1, 2)

    @nnx.jit
    def on_the_whole(layer, x):
        whole = layer(x, mask=masks.causal(), score_mod=alibi)
        return whole, layer.rope(split(layer.key(x))), split(layer.value(x))

    whole, key, value = on_the_whole(layer, x)
    cache = make_cache(np.asarray(key), np.asarray(value), lengths)
    positions = lengths[:, None] + np.arange(num_new)[None]
    graph, state = nnx.split(layer)

    @jax.jit
    def step(state, cache, x, positions):
        layer = nnx.merge(graph, state)
        layer.attention_fn = functools.partial(paged_attention, cache=cache)
        return layer(x, mask=masks.causal(), score_mod=alibi, position_ids_q=positions)

    fresh, wanted = (np.take_along_axis(np.asarray(y), positions[:, :, None], axis=1) for y in (x, whole))
    np.testing.assert_allclose(step(state, cache, fresh, positions), wanted, atol=1e-5)


@pytest.mark.thorough
@forms
def test_the_contents_of_other_slots_have_no_effect(form):
    """The caches of all tests hold NaN there; a cache with 0 gives the same bits."""
    clean = make_cache(*texts(), elsewhere=0.0)
    for have, want in zip(*(call(form, queries(), x, mask=checker) for x in (filled(), clean)), strict=True):
        np.testing.assert_array_equal(have, want)
        assert not np.isnan(have).any()


@pytest.mark.contract
@forms
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
def test_nan_in_a_token_contaminates_only_the_rows_that_may_attend_it(form, bad, which):
    cache = filled()
    pools = [cache.key_pool, cache.value_pool]
    block = cache.block_table[0, 257 // 3]
    pools[which] = pools[which].at[block, 1, 257 % 3, 2].set(bad)
    clean = call(form, queries(), cache, mask=checker)
    contaminated = call(
        form, queries(), dataclasses.replace(cache, key_pool=pools[0], value_pool=pools[1]), mask=checker
    )
    reached = np.zeros((BATCH, HEADS, QUERIES), bool)
    heads, positions = np.arange(3, 6), spans(form)[0][0] + np.arange(QUERIES)
    reached[0, heads] = checker(0, heads[:, None], positions[None], 257)  # kv head 1 serves these
    for have, want in zip(contaminated, clean, strict=True):
        assert np.isnan(have[reached]).all()
        np.testing.assert_array_equal(have[~reached], want[~reached])


@pytest.mark.contract
def test_nan_in_a_new_token_contaminates_only_the_rows_that_may_attend_it():
    key, value = map(new_tokens, texts())
    run = functools.partial(paged_attention, queries(), cache=filled(), **CAUSAL)
    out, clean = run(key, value.at[4, 0, 2].set(np.nan)), run(key, value)
    assert np.isnan(out[4, :3, 2:]).all()
    reached = np.isnan(out)
    assert reached.sum() == 3 * 3 * VALUE_DIM
    np.testing.assert_array_equal(out[~reached], clean[~reached])


@pytest.mark.contract
@pytest.mark.parametrize("form", ["one row", "all rows"])
def test_a_row_without_tokens_gives_exactly_zero(form):
    out, lse = call(form, queries(), filled())
    assert (out[1] == 0).all() and np.isneginf(lse[1]).all()
    assert (out[0] != 0).any() and np.isfinite(np.delete(lse, 1, axis=0)).all()


@pytest.mark.contract
@forms
def test_an_overflowed_row_gives_nan(form):
    cache = dataclasses.replace(filled(), overflowed=jnp.arange(BATCH) == 2)
    for have, want in zip(call(form, queries(), cache), call(form, queries(), filled()), strict=True):
        assert np.isnan(have[2]).all()
        np.testing.assert_array_equal(np.delete(have, 2, axis=0), np.delete(want, 2, axis=0))


@pytest.mark.thorough
@pytest.mark.parametrize("row", [-1, BATCH])
def test_a_traced_index_of_no_row_gives_nan(row):
    run = jax.jit(lambda query, row: paged_attention(query, filled(), row))
    assert np.isnan(run(queries()[0], row)).all()
    assert not np.isnan(run(queries()[0], 1)).any()


@pytest.mark.thorough
def test_tokens_in_no_block_are_not_attended():
    cache = filled()
    cut = dataclasses.replace(cache, block_table=cache.block_table.at[:, 11:].set(-1))
    short = dataclasses.replace(cut, seq_lengths=jnp.minimum(cache.seq_lengths, 33))
    agree(paged_attention(queries(), cut, return_lse=True), paged_attention(queries(), short, return_lse=True))


@pytest.mark.thorough
@batched_forms
def test_compiled_equals_eager(form):
    run = functools.partial(call, form, **CAUSAL)
    agree(jax.jit(run)(queries(), filled()), run(queries(), filled()))


def other_cache(seed):
    lengths = np.random.default_rng(seed).integers(0, 301, BATCH)
    cache = make_cache(*texts(), lengths, spare=100)
    grow = [(0, 700 - cache.key_pool.shape[0]), (0, 0), (0, 0), (0, 0)]
    return dataclasses.replace(
        cache, key_pool=jnp.pad(cache.key_pool, grow), value_pool=jnp.pad(cache.value_pool, grow)
    )


@pytest.mark.thorough
def test_other_lengths_tables_and_rows_compile_nothing_new(count_compilations):
    for seed in range(4):
        cache = other_cache(seed)
        before = len(count_compilations)
        # Rebuilt functions that do the same count as the same.
        mask = lambda b, h, q, kv: kv % 7 < 5
        mod = lambda scores, b, h, q, kv: scores * jnp.cos(0.1 * kv)
        paged_attention(queries(), cache, mask=mask, score_mod=mod)
        paged_attention(queries()[seed], cache, seed, **CAUSAL)
        paged_attention(queries(), *map(new_tokens, texts()), cache=cache, **CAUSAL)
        assert seed == 0 or len(count_compilations) == before


@pytest.mark.contract
@pytest.mark.parametrize("options", [{}, CAUSAL], ids=["everything", "causal"])
def test_memory_does_not_grow_with_the_pool(options):
    """The pool is not cast as a whole either."""

    def temporary_bytes(num_blocks):
        cache = jax.eval_shape(
            lambda: init_paged_kv_cache(
                num_blocks=num_blocks, block_size=8, num_kv_heads=2, head_dim=5, batch_size=3,
                max_blocks_per_seq=num_blocks // 4, dtype=jnp.bfloat16,
            )
        )  # fmt: skip
        query = jax.ShapeDtypeStruct((3, 6, 1, 5), jnp.float32)
        compiled = jax.jit(functools.partial(paged_attention, **options)).lower(query, cache).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(1021), temporary_bytes(16381)
    assert large < small + 2**18  # the larger pool has 2**22 bytes more; the block table, 2**17


@pytest.mark.parametrize(("block_size", "pages"), [(8, 16), (63, 2), (100, 1), (200, 1)])
def test_a_chunk_is_as_many_whole_pages_as_128_keys_hold(block_size, pages):
    sizes = {"num_kv_heads": 1, "head_dim": 2, "batch_size": 1, "max_blocks_per_seq": 20}
    cache = jax.eval_shape(lambda: init_paged_kv_cache(num_blocks=20, block_size=block_size, **sizes))
    assert pages_in_chunk(cache.block_table, cache.key_pool) == pages


def long_cache():
    """Two rows of up to 1201 tokens, 10 chunks of 126."""
    return make_cache(*(np.zeros((2, 1, 1201, dim), np.float32) for dim in (3, 2)), [1201, 1201], elsewhere=0.0)


@pytest.mark.thorough
def test_under_jit_only_chunks_in_use_are_read():
    cache, query = long_cache(), jnp.ones((2, 1, 1, 3))
    lengths = [(0, 0), (1, 0), (255, 3), (3, 256), (700, 0), (1201, 1201)]
    assert count_visits({}, lengths, cache, query) == [0, 1, 3, 3, 6, 10]
    assert count_visits({"mask": masks.sliding_window(7)}, lengths, cache, query) == [0, 1, 3, 3, 1, 1]
    assert count_visits({"mask": lambda b, h, q, kv: q - kv < 300}, lengths, cache, query) == [0, 1, 3, 3, 3, 3]


def test_rows_of_other_lengths_do_not_wait_for_the_longest():
    """19 rows are three groups, sorted by length; each reads the chunks of its own longest row."""
    rows = [np.random.default_rng(3).standard_normal((19, 1, 400, dim), np.float32) for dim in (3, 2)]
    lengths = np.random.default_rng(4).permutation(np.r_[np.full(8, 5), np.full(8, 130), [0, 300, 400]])
    query = jax.device_put(np.random.default_rng(5).standard_normal((19, 2, 2, 3), np.float32))
    cache = make_cache(*rows, lengths, elsewhere=0.0)
    # 0 and seven of 5; one of 5 and seven of 130; one of 130, 300 and 400
    assert count_visits({}, [lengths], cache, query) == [1 + 2 + 4]
    options = {"mask": masks.causal() & checker, "score_mod": alibi, "return_lse": True}
    together = paged_attention(query, cache, **options)
    new = [jax.device_put(np.random.default_rng(6).standard_normal((19, 1, 2, dim), np.float32)) for dim in (3, 2)]
    dropped = {"dropout_rng": jax.random.key(0), "dropout_rate": 0.4, "deterministic": False}
    with_new = paged_attention(query, *new, cache=cache, mask=masks.causal(), return_lse=True)
    for row in (2, 11, 18):  # of the new tokens, and with dropout by the true row
        one = dataclasses.replace(
            cache,
            **{name: getattr(cache, name)[row : row + 1] for name in ("block_table", "seq_lengths", "overflowed")},
        )
        alone = paged_attention(
            query[row : row + 1], *(x[row : row + 1] for x in new), cache=one, mask=masks.causal(), return_lse=True
        )
        agree([x[row : row + 1] for x in with_new], alone)
        alone = paged_attention(query[row], cache, np.int32(row), **dropped)
        np.testing.assert_allclose(paged_attention(query, cache, **dropped)[row], alone, atol=1e-5)
    alone = [paged_attention(query[row], cache, np.int32(row), **options) for row in range(19)]
    agree(together, [jnp.stack(x) for x in zip(*alone, strict=True)])


@pytree_dataclass
class Watched(masks.Mask):
    """A mask that says when it is evaluated."""

    mask: masks.Mask

    def __call__(self, b, h, q, kv):
        jax.debug.callback(lambda: evaluations.append(1))
        return self.mask(b, h, q, kv)

    def tile(self, *tile):
        return self.mask.tile(*tile)


evaluations = []


@pytest.mark.thorough
@pytest.mark.parametrize(("window", "count"), [(7, 1), (300, 3), (900, 8)])
def test_chunks_outside_of_the_bounds_of_a_mask_are_not_even_tested(window, count):
    del evaluations[:]
    paged_attention(jnp.ones((2, 1, 1, 3)), long_cache(), mask=Watched(masks.sliding_window(window)))
    jax.effects_barrier()
    assert len(evaluations) == count


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("form", "dtype"), [("all rows", jnp.bfloat16), ("all rows", jnp.float16), ("attention_fn", jnp.bfloat16)]
)
def test_low_precision_is_rounded_once(form, dtype):
    """The result is the exact one for the rounded numbers; the lse stays float32."""
    query, *text = (jnp.asarray(x, dtype) for x in (queries(), *texts()))
    cache = dataclasses.replace(
        filled(), key_pool=filled().key_pool.astype(dtype), value_pool=filled().value_pool.astype(dtype)
    )
    new = () if FORMS[form][1] else map(new_tokens, text)
    out, lse = paged_attention(query, *new, cache=cache, mask=masks.causal(), return_lse=True)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    exact, exact_lse = expected(query, *spans(form), mask=masks.causal(), text=text)
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=jnp.finfo(dtype).eps, atol=1e-6)


@pytest.mark.thorough
def test_pools_may_have_another_precision_than_the_query():
    pools = {"key_pool": filled().key_pool.astype(jnp.bfloat16), "value_pool": filled().value_pool.astype(jnp.float16)}
    out, lse = paged_attention(queries(), dataclasses.replace(filled(), **pools), return_lse=True)
    text = jnp.asarray(texts()[0], jnp.bfloat16), jnp.asarray(texts()[1], jnp.float16)
    assert out.dtype == lse.dtype == jnp.float32
    agree((out, lse), expected(queries(), *spans("all rows"), text=text))


@pytest.mark.contract
@batched_forms
def test_dropout_drops_weights_by_their_true_positions(form):
    rng, rate = jax.random.key(7), 0.3
    options = {"dropout_rng": rng, "dropout_rate": rate, "deterministic": False}
    starts, ends = spans(form)
    b, h, q, kv = np.indices((BATCH, HEADS, QUERIES, CAPACITY), sparse=True)
    kept = np.asarray(keep_weights(dropout_words(rng), rate, b, h, q + starts[:, None, None, None], kv))
    wanted = expected(queries(), starts, ends, keep_weights=kept, dropout_rate=rate)
    agree(call(form, queries(), filled(), **options), wanted)
    off = call(form, queries(), filled(), **options | {"deterministic": True})
    np.testing.assert_array_equal(off[0], call(form, queries(), filled())[0])


@pytest.mark.thorough
def test_nan_from_a_score_mod_is_seen_where_it_is_attended_and_nowhere_else():
    run = functools.partial(paged_attention, queries(), filled(), mask=masks.padding(jnp.array([300, 9, 9, 9, 131])))
    out = run(score_mod=lambda scores, b, h, q, kv: jnp.where(kv >= 300, jnp.nan, scores))
    assert not np.isnan(out).any()
    out = run(score_mod=lambda scores, b, h, q, kv: jnp.where((kv >= 130) & (h == 2), jnp.nan, scores))
    assert np.isnan(out[np.array([0, 4]), 2]).all()
    assert not np.isnan(np.delete(out, 2, axis=1)).any() and not np.isnan(out[1:4]).any()


@pytest.mark.thorough
def test_arrays_that_a_mod_captures_are_read_within_their_bounds():
    bias = jnp.arange(311.0) * 0.01

    def mod(scores, b, h, q, kv):
        return scores + bias.at[kv].get(mode="fill", fill_value=jnp.nan)

    wanted = expected(queries(), *spans("all rows"), score_mod=mod)
    agree(paged_attention(queries(), filled(), score_mod=mod, return_lse=True), wanted)


@pytest.mark.thorough
def test_vmap_over_rows_equals_the_batched_form():
    run = lambda query, row: paged_attention(query, filled(), row, mask=masks.causal(), score_mod=alibi)
    mapped = jax.vmap(run)(queries(), jnp.arange(BATCH))
    agree([mapped], [paged_attention(queries(), filled(), mask=masks.causal(), score_mod=alibi)])


@pytest.mark.thorough
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_heads_may_be_split_over_devices(axis_type):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(axis_type,))
    heads = PartitionSpec(None, "model")  # of the pools too
    specs = PagedKVCache(heads, heads, PartitionSpec(), PartitionSpec(), PartitionSpec())
    slopes = jnp.linspace(0.01, 0.1, HEADS)

    def run(query, key, value, cache, slopes):
        mod = lambda scores, b, h, q, kv: scores - slopes[h] * abs(q - kv)
        in_cache = paged_attention(query, cache, mask=masks.causal(), score_mod=mod)
        return in_cache + paged_attention(query, key, value, cache=cache, mask=masks.causal(), score_mod=mod)

    arguments = queries(), *map(new_tokens, texts()), filled(), slopes
    in_specs = heads, heads, heads, specs, PartitionSpec("model")
    place = lambda spec, x: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    is_spec = lambda x: isinstance(x, PartitionSpec)
    placed = jax.tree.map(place, in_specs, arguments, is_leaf=is_spec)
    split = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=heads))
    agree([split(*placed)], [jax.jit(run)(*arguments)])


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


@pytest.mark.thorough
@pytest.mark.parametrize("through", REVERSE)
def test_reverse_mode_raises(through):
    run = lambda x: REVERSE[through](x, filled()).sum()
    with pytest.raises(NotImplementedError, match="no reverse-mode derivative.*memory_efficient_attention"):
        jax.grad(run)(jnp.float32(1.0))


@pytest.mark.thorough
@batched_forms
def test_forward_mode_is_that_of_standard_attention(form):
    starts, ends = map(jnp.asarray, spans(form))
    mod = lambda scores, b, h, q, kv: alibi(scores, b, h, q + starts[b], kv)
    keep = lambda b, h, q, kv: (kv <= q + starts[b]) & (kv < ends[b])
    standard = lambda x: standard_attention(x, *map(jnp.asarray, texts()), mask=keep, score_mod=mod)
    paged = lambda x: call(form, x, filled(), mask=masks.causal(), score_mod=alibi)[0]
    step = jax.random.normal(jax.random.key(9), queries().shape)
    actual, wanted = (jax.jit(lambda x, dx, f=f: jax.jvp(f, (x,), (dx,)))(queries(), step) for f in (paged, standard))
    agree(actual, wanted)


def changed(**fields):
    return dataclasses.replace(filled(), **fields)


Q = np.zeros((BATCH, HEADS, QUERIES, KEY_DIM), np.float32)
KEY, VALUE = (
    np.zeros((BATCH, KV_HEADS, QUERIES, KEY_DIM), np.float32),
    np.zeros((BATCH, KV_HEADS, QUERIES, VALUE_DIM), np.float32),
)


@pytest.mark.contract
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
        (lambda: paged_attention(Q[:, :5], filled()), "query heads must be a multiple of .* key heads; got 5 and 2"),
        (lambda: paged_attention(Q[:, :0], filled()), "query heads must be a multiple of .* key heads; got 0 and 2"),
        (lambda: paged_attention(Q.astype(int), filled()), "must be floating; got int32, float32 and float32"),
        (
            lambda: paged_attention(Q, changed(key_pool=filled().key_pool.astype(jnp.int8))),
            "must be floating; got float32, int8 and float32",
        ),
        (
            lambda: paged_attention(Q, KEY[:, :, :3], VALUE[:, :, :3], cache=filled()),
            r"key and value must hold the tokens of query, .*\(5, 2, 5, 5\) and \(5, 2, 5, 7\); got key.shape=",
        ),
        (lambda: paged_attention(Q, KEY.astype(int), VALUE, cache=filled()), "must have one floating dtype; got"),
        (lambda: paged_attention(Q, KEY, KEY, cache=filled()), r"got .*, value.shape=\(5, 2, 5, 5\)"),
        (lambda: paged_attention(Q, KEY[:, :1], VALUE, cache=filled()), r"got key.shape=\(5, 1, 5, 5\)"),
        (
            lambda: paged_attention(Q, KEY.astype(jnp.bfloat16), VALUE, cache=filled()),
            "query, key and value must have one floating dtype; got float32, bfloat16, float32",
        ),
        (
            lambda: paged_attention(Q, KEY, VALUE, cache=filled(), mask=np.ones((5, 5), bool)),
            r"tokens in the cache come before the new ones; got mask.shape=\(5, 5\) for 5 new tokens behind",
        ),
        (
            lambda: paged_attention(Q, filled(), mask=masks.documents(np.arange(311))),
            "positions of cached and new tokens: documents need one id a token",
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


@pytest.mark.usefixtures("unchecked_shapes")  # a symbol is no int, as shapes are annotated
def test_any_batch_is_exported():
    (batch,) = export.symbolic_shape("batch")
    cache = make_cache(*texts())

    def rows(x):
        return jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)

    names = ("block_table", "seq_lengths", "overflowed")
    any_rows = dataclasses.replace(cache, **{name: rows(getattr(cache, name)) for name in names})
    exported = export.export(jax.jit(paged_attention))(rows(queries()), any_rows)
    np.testing.assert_allclose(exported.call(queries(), cache), paged_attention(queries(), cache), atol=1e-6)
