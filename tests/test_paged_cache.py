"""The paged cache: sequences of different lengths in one pool of pages, against lists in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnax.paged_cache import (
    allocate_blocks,
    allocate_rows,
    append_kv,
    append_rows,
    free_rows,
    gather_kv,
    gather_rows,
    init_paged_kv_cache,
)

BATCH, BLOCKS, PER_ROW, SIZE, KV_HEADS, KEY_DIM, VALUE_DIM, CHUNK = 5, 23, 7, 3, 2, 11, 13, 4

# The cache is donated: these functions write in place.
allocate = jax.jit(allocate_rows, donate_argnums=0)
append = jax.jit(append_rows, donate_argnums=0)
free = jax.jit(free_rows, donate_argnums=0)
gather = jax.jit(gather_rows)


def make_cache(**changes):
    sizes = {
        "num_blocks": BLOCKS,
        "block_size": SIZE,
        "num_kv_heads": KV_HEADS,
        "head_dim": KEY_DIM,
        "batch_size": BATCH,
        "max_blocks_per_seq": PER_ROW,
        "value_dim": VALUE_DIM,
    }
    return init_paged_kv_cache(**sizes | changes)


def make_tokens(seed, *leading):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((*leading, size), np.float32) for size in (KEY_DIM, VALUE_DIM)]


def blocks_of(cache):
    """The pages of each row; checks that they are in the first columns, within the pool and in one row only."""
    table = np.asarray(cache.block_table)
    rows = [row[row >= 0].tolist() for row in table]
    for row, held in zip(table, rows, strict=True):
        assert (row[len(held) :] == -1).all()
    held = [block for row in rows for block in row]
    assert len(set(held)) == len(held) and set(held) <= set(range(cache.key_pool.shape[0]))
    return rows


class Lists:
    """The expected cache: for each row a list of tokens, a number of pages, and whether a token was dropped."""

    def __init__(self):
        self.tokens = [[] for _ in range(BATCH)]
        self.num_blocks = [0] * BATCH
        self.overflowed = [False] * BATCH

    def allocate(self, counts):
        pool = BLOCKS - sum(self.num_blocks)
        for row, count in enumerate(counts):
            total = len(self.tokens[row]) + count
            missing = max(0, -(-total // SIZE) - self.num_blocks[row])
            if total > PER_ROW * SIZE:
                self.overflowed[row] = True
            elif missing > pool:
                self.overflowed[row], pool = True, 0
            else:
                self.num_blocks[row] += missing
                pool -= missing

    def append(self, keys, values, counts):
        for row, count in enumerate(counts):
            if len(self.tokens[row]) + count > self.num_blocks[row] * SIZE:
                self.overflowed[row] = True
            else:
                self.tokens[row] += [(keys[row, :, t], values[row, :, t]) for t in range(count)]

    def free(self, rows):
        for row in np.flatnonzero(rows):
            self.tokens[row], self.num_blocks[row], self.overflowed[row] = [], 0, False

    def check(self, cache):
        assert [len(blocks) for blocks in blocks_of(cache)] == self.num_blocks
        assert cache.overflowed.tolist() == self.overflowed
        keys, values, lengths = map(np.asarray, gather(cache))
        assert lengths.tolist() == [len(tokens) for tokens in self.tokens]
        for row, tokens in enumerate(self.tokens):
            for t, (key, value) in enumerate(tokens):
                np.testing.assert_array_equal(keys[row, :, t], key)
                np.testing.assert_array_equal(values[row, :, t], value)
            assert not keys[row, :, len(tokens) :].any() and not values[row, :, len(tokens) :].any()


def test_documented_example():
    num_kv_heads, head_dim = 4, 16
    paged = init_paged_kv_cache(
        num_blocks=16,
        block_size=8,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        batch_size=2,
        max_blocks_per_seq=4,
        dtype=jnp.float32,
    )
    free = np.arange(16, dtype=np.int32)
    rng, given = np.random.default_rng(0), []
    for seq_idx, n_tokens in enumerate([12, 5]):
        paged, used = allocate_blocks(paged, sequence_idx=seq_idx, num_new_tokens=n_tokens, free_block_ids=free)
        free = free[used:]
        keys, values = rng.standard_normal((2, n_tokens, num_kv_heads, head_dim), np.float32)
        paged = append_kv(paged, sequence_idx=seq_idx, keys_new=keys, values_new=values)
        given.append((keys, values))

    assert free.tolist() == list(range(3, 16))
    assert paged.block_table.tolist() == [[0, 1, -1, -1], [2, -1, -1, -1]]
    assert paged.key_pool.shape == paged.value_pool.shape == (16, 4, 8, 16)
    assert (paged.block_size, paged.max_len) == (8, 32)
    for seq_idx, (keys, values) in enumerate(given):
        got_keys, got_values, length = gather_kv(paged, seq_idx)
        assert type(length) is int and length == len(keys)
        np.testing.assert_array_equal(got_keys, keys)
        np.testing.assert_array_equal(got_values, values)


def test_batched_forms_are_ragged_lists_and_compile_once(count_compilations):
    rng = np.random.default_rng(0)
    lists, cache = Lists(), make_cache()
    overflows = 0
    for step in range(500):
        action = rng.choice(["allocate", "append", "free"], p=[0.42, 0.5, 0.08])
        if action == "allocate":
            counts = rng.integers(0, rng.choice([2, CHUNK + 1, 12]), BATCH, dtype=np.int32)
            cache = allocate(cache, counts)
            lists.allocate(counts)
        elif action == "append":
            room = [held * SIZE - len(tokens) for held, tokens in zip(lists.num_blocks, lists.tokens, strict=True)]
            limit = np.full(BATCH, CHUNK) if rng.random() < 0.1 else np.minimum(room, CHUNK)
            counts = rng.integers(0, limit + 1, dtype=np.int32)
            keys, values = make_tokens(step, BATCH, KV_HEADS, CHUNK)
            padding = np.arange(CHUNK) >= counts[:, None]
            keys[np.broadcast_to(padding[:, None], keys.shape[:3])] = np.nan  # padding must not be stored
            cache = append(cache, keys, values, counts)
            lists.append(keys, values, counts)
        else:
            rows = rng.random(BATCH) < 0.3
            cache = free(cache, rows)
            lists.free(rows)
        lists.check(cache)
        overflows += sum(lists.overflowed)
        if step == 50:
            del count_compilations[:]
    assert not count_compilations
    assert overflows > 100


def test_documented_forms_are_ragged_lists():
    rng = np.random.default_rng(1)
    cache, pool = make_cache(), list(range(BLOCKS))
    rng.shuffle(pool)
    rows = [(np.zeros((0, KV_HEADS, KEY_DIM)), np.zeros((0, KV_HEADS, VALUE_DIM)))] * BATCH
    for step in range(60):
        row, num_new = int(rng.integers(BATCH)), int(rng.choice([1, CHUNK]))
        if len(rows[row][0]) + num_new > cache.max_len or len(pool) < 2:
            pool += blocks_of(cache)[row]
            cache = free(cache, np.arange(BATCH) == row)
            rows[row] = tuple(x[:0] for x in rows[row])
        expected, before = pool[:], blocks_of(cache)
        cache, used = allocate_blocks(
            cache, sequence_idx=np.int64(row), num_new_tokens=num_new, free_block_ids=np.array(pool, np.int32)
        )
        pool = pool[used:]
        assert blocks_of(cache)[row] == before[row] + expected[:used]
        keys, values = make_tokens(step, num_new, KV_HEADS)
        cache = append_kv(cache, row, keys, values)
        rows[row] = tuple(np.concatenate(pair) for pair in zip(rows[row], (keys, values), strict=True))
        assert len(blocks_of(cache)[row]) == -(-len(rows[row][0]) // SIZE)

    all_keys, all_values, lengths = map(np.asarray, gather(cache))
    assert len(set(lengths.tolist())) > 2
    for row, (keys, values) in enumerate(rows):
        assert int(lengths[row]) == len(keys)
        if row in (0, np.argmax(lengths)):  # every length compiles a program
            for got, want in zip(gather_kv(cache, np.int32(row)), (keys, values, len(keys)), strict=True):
                np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(all_keys[row, :, : len(keys)], np.moveaxis(keys, 1, 0))
        np.testing.assert_array_equal(all_values[row, :, : len(values)], np.moveaxis(values, 1, 0))


def test_documented_and_batched_forms_write_the_same():
    keys, values = make_tokens(0, BATCH, KV_HEADS, CHUNK)
    one_by_one, free_ids = make_cache(), np.arange(BLOCKS)
    counts = np.array([0, 1, 4, 1, 4])
    for row, count in enumerate(counts):
        one_by_one, used = allocate_blocks(one_by_one, sequence_idx=row, num_new_tokens=count, free_block_ids=free_ids)
        free_ids = free_ids[used:]
        new = (np.moveaxis(x[row, :, :count], 1, 0) for x in (keys, values))
        one_by_one = append_kv(one_by_one, row, *new)
    together = append(allocate(make_cache(), counts), keys, values, counts)
    jax.tree.map(np.testing.assert_array_equal, one_by_one, together)


def test_freed_blocks_are_reused_in_order():
    cache = allocate_rows(make_cache(), np.array([4, 1, 7, 2, 0]))
    assert blocks_of(cache) == [[0, 1], [2], [3, 4, 5], [6], []]
    cache = free_rows(cache, np.array([False, True, True, False, False]))
    cache = allocate_rows(cache, np.array([5, 2, 3, 4, 1]))  # lengths are still 0: rows 0 and 3 hold blocks already
    assert blocks_of(cache) == [[0, 1], [2], [3], [6, 4], [5]]


def test_freed_tokens_do_not_come_back():
    non_finite = [np.full_like(x, np.nan) for x in make_tokens(0, BATCH, KV_HEADS, CHUNK)]
    cache = append(allocate(make_cache(), CHUNK), *non_finite, CHUNK)
    cache = allocate(free(cache, np.ones(BATCH, bool)), CHUNK)
    tokens = make_tokens(0, BATCH, KV_HEADS, CHUNK)
    cache = append(cache, *tokens, 1)
    for got, want in zip(map(np.asarray, gather(cache)), tokens, strict=False):
        np.testing.assert_array_equal(got[:, :, :1], want[:, :, :1])
        assert not got[:, :, 1:].any()


def test_one_number_counts_for_every_row():
    keys, values = make_tokens(0, BATCH, KV_HEADS, CHUNK)
    for number in (2, np.int32(2), jnp.int32(2)):
        cache = append_rows(allocate_rows(make_cache(), np.asarray(number)), keys, values, jnp.asarray(number))
        assert cache.seq_lengths.tolist() == [2] * BATCH
    assert append_rows(allocate_rows(make_cache(), CHUNK), keys, values).seq_lengths.tolist() == [CHUNK] * BATCH


def test_overflow_under_jit_leaves_everything_else_as_it_was():
    keys, values = make_tokens(0, BATCH, KV_HEADS, CHUNK)
    append_again = jax.jit(append_rows)  # without donation
    before = append(allocate(make_cache(), CHUNK), keys, values, np.array([4, 3, 4, 1, 0]))

    # Each row has 6 slots: rows 0 and 2 have no room for 3 more tokens.
    after = append_again(before, *make_tokens(1, BATCH, KV_HEADS, CHUNK), np.array([3, 3, 3, 3, 3]))
    assert after.overflowed.tolist() == [True, False, True, False, False]
    assert after.seq_lengths.tolist() == [4, 6, 4, 4, 3]
    blocks = blocks_of(before)
    written = blocks[1] + blocks[3] + blocks[4]
    others = np.setdiff1d(np.arange(BLOCKS), written)
    pools = ((before.key_pool, after.key_pool), (before.value_pool, after.value_pool))
    for pool_before, pool_after in (map(np.asarray, pair) for pair in pools):
        np.testing.assert_array_equal(pool_after[others], pool_before[others])
        assert (pool_after[np.array(written)] != pool_before[np.array(written)]).any()

    # It stays set until the row is freed, also if later writes fit.
    after = append_again(allocate(after, np.ones(BATCH, np.int32)), keys, values, np.array([1, 0, 0, 0, 0]))
    assert after.overflowed.tolist() == [True, False, True, False, False]
    assert int(after.seq_lengths[0]) == 5
    assert free(after, np.arange(BATCH) == 2).overflowed.tolist() == [True] + [False] * 4


def test_counts_out_of_range_are_overflow_under_jit():
    keys, values = make_tokens(0, BATCH, KV_HEADS, CHUNK)
    wrong = np.array([-1, CHUNK + 1, 2**31 - 1, -(2**31), 0])
    after = append(allocate(make_cache(), CHUNK), keys, values, wrong)
    assert after.overflowed.tolist() == [True, True, True, True, False]
    assert not np.asarray(after.seq_lengths).any() and not np.asarray(after.key_pool).any()
    after = allocate(allocate(make_cache(), CHUNK), np.array([-1, 22, 2**31 - 1, -(2**31), 21]))
    assert after.overflowed.tolist() == [True, True, True, True, False]
    assert [len(blocks) for blocks in blocks_of(after)] == [2, 2, 2, 2, 7]


def test_a_row_overflows_if_the_pool_has_too_few_pages_and_other_rows_do_not():
    cache = allocate(make_cache(), np.array([21, 21, 0, 0, 3]))  # 7, 7 and 1 of 23 blocks
    cache = allocate(cache, np.array([0, 1, 25, 21, 5]))  # row 2 has no room; 7 + 1 of 8 blocks
    assert [len(blocks) for blocks in blocks_of(cache)] == [7, 7, 0, 7, 2]
    assert cache.overflowed.tolist() == [False, False, True, False, False]
    cache = allocate(cache, np.array([21, 0, 1, 0, 6]))  # nothing is left
    assert [len(blocks) for blocks in blocks_of(cache)] == [7, 7, 0, 7, 2]
    cache = allocate(free(cache, np.arange(BATCH) == 1), np.array([0, 12, 12, 0, 7]))
    assert [len(blocks) for blocks in blocks_of(cache)] == [7, 4, 0, 7, 2]  # row 4 does not overtake row 2
    assert cache.overflowed.tolist() == [False, False, True, False, True]


def test_donated_caches_are_written_in_place():
    cache = make_cache()
    pointers = [pool.unsafe_buffer_pointer() for pool in (cache.key_pool, cache.value_pool)]

    def step(cache, keys, values):
        return append_rows(allocate_rows(cache, CHUNK), keys, values)

    after = jax.jit(step, donate_argnums=0)(cache, *make_tokens(0, BATCH, KV_HEADS, CHUNK))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    assert [pool.unsafe_buffer_pointer() for pool in (after.key_pool, after.value_pool)] == pointers


def test_caches_are_pytrees_that_a_loop_carries():
    keys, values = make_tokens(0, BATCH, KV_HEADS, CHUNK)

    def step(cache, token):
        cache = append_rows(allocate_rows(cache, 1), *(x[:, :, None] for x in token))
        return cache, cache.seq_lengths

    tokens = tuple(np.moveaxis(x, 2, 0) for x in (keys, values))
    cache, lengths = jax.jit(partial(jax.lax.scan, step))(make_cache(), tokens)
    assert np.asarray(lengths)[:, 0].tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(np.asarray(gather(cache)[0])[:, :, :CHUNK], keys)


def test_writes_take_the_dtype_of_the_pool():
    keys, values = make_tokens(0, BATCH, KV_HEADS, CHUNK)
    cache = append(allocate(make_cache(dtype=jnp.bfloat16), CHUNK), keys, values, CHUNK)
    assert cache.key_pool.dtype == cache.value_pool.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gather(cache)[1])[:, :, :CHUNK], values.astype(jnp.bfloat16))


def test_gradients_reach_the_tokens_that_were_written():
    counts = np.array([4, 0, 1, 3, 2])
    keys, values = make_tokens(0, BATCH, KV_HEADS, CHUNK)

    @jax.jit
    def gradients(cache, keys, values):
        def total(keys, values):
            read_keys, read_values, _ = gather_rows(append_rows(cache, keys, values, counts))
            return read_keys.sum() + 2 * read_values.sum()

        return jax.grad(total, argnums=(0, 1))(keys, values)

    written = np.arange(CHUNK)[None, None, :, None] < counts[:, None, None, None]
    for factor, gradient in enumerate(gradients(allocate(make_cache(), counts), keys, values), start=1):
        np.testing.assert_array_equal(gradient, np.broadcast_to(factor * written, gradient.shape))


def test_a_new_cache_is_zero_and_value_dim_defaults_to_head_dim():
    cache = make_cache(value_dim=None)
    assert cache.value_pool.shape == (BLOCKS, KV_HEADS, SIZE, KEY_DIM)
    assert not any(np.asarray(x).any() for x in (cache.key_pool, cache.value_pool, cache.overflowed))
    keys, values, length = gather_kv(cache, 0)
    assert keys.shape == values.shape == (0, KV_HEADS, KEY_DIM) and length == 0


@pytest.mark.parametrize(
    "name",
    ["num_blocks", "block_size", "num_kv_heads", "head_dim", "batch_size", "max_blocks_per_seq", "value_dim"],
)
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"init_paged_kv_cache: {name} must be at least 1; got {name}=0."):
        make_cache(**{name: 0})


def allocated(**changes):
    arguments = {"sequence_idx": 0, "num_new_tokens": 1, "free_block_ids": np.arange(2, BLOCKS)} | changes
    return allocate_blocks(started(), **arguments)


def started():
    """A cache in which row 1 holds pages 0 and 1, with four tokens."""
    cache, _ = allocate_blocks(make_cache(), sequence_idx=1, num_new_tokens=4, free_block_ids=np.arange(BLOCKS))
    return append_kv(cache, 1, *make_tokens(0, 4, KV_HEADS))


def tokens(*leading):
    return make_tokens(0, *leading)


def swapped(*leading):
    return tokens(*leading)[::-1]


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: allocated(sequence_idx=5), "allocate_blocks: sequence_idx must be an integer between 0 and 4; got"),
        (lambda: allocated(sequence_idx=-1), "between 0 and 4; got sequence_idx=-1"),
        (lambda: allocated(sequence_idx=1.0), "must be an integer .*; got sequence_idx=1.0"),
        (lambda: allocated(num_new_tokens=-1), "num_new_tokens must be an integer between 0 and 21.*; got .*=-1"),
        (lambda: allocated(sequence_idx=1, num_new_tokens=18), "between 0 and 17, the room past length=4; got .*=18"),
        (
            lambda: allocated(sequence_idx=1, num_new_tokens=10, free_block_ids=np.array([7, 2])),
            "allocate_blocks: sequence 1 needs 3 blocks for 10 new tokens; got 2 in free_block_ids",
        ),
        (lambda: allocated(free_block_ids=np.array([2, 23])), "free_block_ids must lie between 0 and 22; got .2, 23."),
        (lambda: allocated(free_block_ids=np.array([-1, 2])), "free_block_ids must lie between 0 and 22; got .-1, 2."),
        (lambda: allocated(free_block_ids=np.array([3, 3])), "must name each block once; got .3, 3."),
        (lambda: allocated(free_block_ids=np.array([3, 1])), "blocks .1. are already in use; got .3, 1."),
        (lambda: allocated(free_block_ids=np.ones(3)), "must be integers in one axis; got shape=.3,., dtype=float64"),
        (lambda: allocated(free_block_ids=np.ones((1, 3), int)), "must be integers in one axis; got shape=.1, 3."),
        (lambda: append_kv(started(), 5, *tokens(1, KV_HEADS)), "append_kv: sequence_idx must be an integer between"),
        (
            lambda: append_kv(started(), 1, *tokens(3, KV_HEADS)),
            "append_kv: 3 new tokens behind length=4 reach an unallocated block; got blocks .0, 1. of 3 tokens for "
            "sequence 1. Call allocate_blocks first.",
        ),
        (lambda: append_kv(started(), 0, *tokens(1, KV_HEADS)), "unallocated block; got blocks .. of 3 tokens"),
        (lambda: append_kv(started(), 1, *tokens(1, 3)), "keys_new must have shape .*=.1, 2, 11.; got .*=.1, 3, 11."),
        (lambda: append_kv(started(), 1, *swapped(1, KV_HEADS)), "keys_new must have .*=.1, 2, 11.; got .*=.1, 2, 13."),
        (
            lambda: append_kv(started(), 1, tokens(1, KV_HEADS)[0], tokens(2, KV_HEADS)[1]),
            "append_kv: values_new must have shape .*=.1, 2, 13.; got values_new.shape=.2, 2, 13.",
        ),
        (lambda: append_kv(started(), 1, np.float32(0), np.float32(0)), "keys_new must have shape .*; got .*=..\\."),
        (lambda: gather_kv(started(), -1), "gather_kv: sequence_idx must be an integer between 0 and 4; got .*=-1"),
        (lambda: allocate_rows(started(), np.ones(3, int)), "allocate_rows: .* integers of shape .5,.*; got shape=.3,"),
        (lambda: allocate_rows(started(), 1.0), "one integer; got shape=.., dtype=float"),
        (lambda: allocate_rows(started(), True), "one integer; got shape=.., dtype=bool"),
        (lambda: allocate_rows(started(), 22), "num_new_tokens must lie between 0 and 21; got num_new_tokens=22"),
        (lambda: allocate_rows(started(), 2**40), "num_new_tokens must lie between 0 and 21; got"),
        (lambda: allocate_rows(started(), np.array([0, 0, -1, 0, 0])), "between 0 and 21; got .*=.0, 0, -1, 0, 0."),
        (
            lambda: allocate_rows(started(), np.array([0, 18, 0, 0, 0])),
            "allocate_rows: every row must get its blocks; got .* with 21 free blocks of 3 tokens and max_len=21, "
            "too few for rows .1.",
        ),
        (
            lambda: allocate_rows(started(), np.array([21, 0, 21, 21, 1])),
            "with 21 free blocks .*, too few for rows .4.",
        ),
        (
            lambda: append_rows(started(), *tokens(BATCH, KV_HEADS, 4), np.array([0, 2, 1, 0, 0])),
            "append_rows: every row must hold .* unallocated block in rows .2.. Call allocate_rows first.",
        ),
        (
            lambda: append_rows(started(), *tokens(BATCH, KV_HEADS, 4), 5),
            "num_new_tokens must lie between 0 and 4; got",
        ),
        (lambda: append_rows(started(), *tokens(2, KV_HEADS, 4)), "keys_new must have shape .*=.5, 2, 4, 11.; got"),
        (lambda: append_rows(started(), *swapped(BATCH, KV_HEADS, 4)), "append_rows: keys_new must .*; got .* 13."),
        (
            lambda: append_rows(started(), tokens(BATCH, KV_HEADS, 4)[0], tokens(BATCH, KV_HEADS, 3)[1]),
            "values_new must have shape .*=.5, 2, 4, 13.; got values_new.shape=.5, 2, 3, 13.",
        ),
        (
            lambda: free_rows(started(), np.ones(4, bool)),
            "free_rows: rows must be booleans of shape .5,.*got shape=.4,",
        ),
        (lambda: free_rows(started(), np.ones(5, int)), "rows must be booleans .*; got shape=.5,., dtype=int"),
    ],
)
def test_wrong_input_is_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda cache: gather_kv(cache, 0), "gather_kv: .* known values; got traced ones. Use gather_rows under jit"),
        (lambda cache: append_kv(cache, 0, *tokens(1, KV_HEADS)), "append_kv: .* Use append_rows under jit"),
        (
            lambda cache: allocate_blocks(cache, sequence_idx=0, num_new_tokens=1, free_block_ids=np.arange(3)),
            "allocate_blocks: .* Use allocate_rows under jit",
        ),
        (
            lambda cache: allocate_blocks(
                make_cache(), sequence_idx=0, num_new_tokens=1, free_block_ids=cache.block_table[0]
            ),
            "allocate_blocks: .* Use allocate_rows under jit",
        ),
    ],
)
def test_documented_forms_name_the_batched_form_under_jit(function, words):
    with pytest.raises(ValueError, match=words):
        jax.jit(function)(make_cache())


def test_a_traced_index_is_refused_in_words():
    with pytest.raises(ValueError, match="gather_kv: .* Use gather_rows under jit"):
        jax.jit(partial(gather_kv, make_cache()))(0)


def test_eager_calls_compile_nothing_new_for_another_row(count_compilations):
    cache, free_ids = make_cache(), np.arange(BLOCKS)
    for row in range(BATCH):
        cache, used = allocate_blocks(cache, sequence_idx=row, num_new_tokens=4, free_block_ids=free_ids)
        free_ids = free_ids[used:]
        cache = append_kv(cache, row, *make_tokens(row, 4, KV_HEADS))
        if row == 0:
            del count_compilations[:]
    assert not count_compilations
