"""Attention over several sets of keys is one attention over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnax import (
    cached_attention,
    flash_attention,
    init_ring_kv_cache,
    masks,
    merge_attention,
    standard_attention,
)


def normal(seed, *shape, dtype=np.float32):
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def test_values_and_gradients_are_those_of_one_attention():
    # A window: the first query attends nothing of the last part, the last queries nothing of the first part. The second
    # part is one key that no query attends, and the fifth query attends nothing at all.
    with jax.enable_x64(True):
        query, key, value, d_out = (
            normal(n, *shape, dtype=np.float64)
            for n, shape in enumerate([(2, 4, 7, 5), (2, 2, 13, 5), (2, 2, 13, 3), (2, 4, 7, 3)])
        )
        d_lse = normal(4, 2, 4, 7, dtype=np.float64)
        keep = np.tri(7, 13, 2, dtype=bool) & ~np.tri(7, 13, -1, dtype=bool)
        keep[:, 2] = keep[4] = False
        keep = jax.device_put(keep)

        def of_all(query, key, value):
            return standard_attention(query, key, value, mask=keep, return_lse=True)

        def of_parts(query, key, value):
            cuts = slice(0, 2), slice(2, 3), slice(3, 13)
            return merge_attention(
                [
                    standard_attention(query, key[:, :, cut], value[:, :, cut], mask=keep[:, cut], return_lse=True)
                    for cut in cuts
                ]
            )

        def run(attend):
            (out, lse), pull = jax.vjp(attend, query, key, value)
            return out, lse, pull((d_out, jnp.zeros_like(lse))), pull((jnp.zeros_like(out), d_lse))

        parts, whole = jax.jit(run, static_argnums=0)(of_parts), jax.jit(run, static_argnums=0)(of_all)
    jax.tree.map(lambda have, want: np.testing.assert_allclose(have, want, rtol=0, atol=1e-13), parts, whole)
    out, lse = map(np.asarray, parts[:2])
    assert (out[:, :, 4] == 0).all() and (lse[:, :, 4] == -np.inf).all()


def test_one_part_is_itself_and_bfloat16_is_merged_in_float32():
    out, lse = normal(0, 1, 2, 3, 5).astype(jnp.bfloat16), normal(1, 1, 2, 3)
    same, same_lse = merge_attention([(out, lse)])
    np.testing.assert_array_equal(same, out)
    np.testing.assert_allclose(same_lse, lse, rtol=1e-6)
    merged, merged_lse = merge_attention([(out, lse)] * 3)
    np.testing.assert_array_equal(merged, out)
    np.testing.assert_allclose(merged_lse, lse + np.log(3), rtol=1e-6)
    assert merged.dtype == jnp.bfloat16 and merged_lse.dtype == jnp.float32


def test_a_non_finite_part_is_seen_in_its_queries_only():
    out, lse = np.ones((1, 1, 5, 2), np.float32), np.zeros((1, 1, 5), np.float32)
    spoiled, spoiled_lse = out.copy(), lse.copy()
    spoiled[0, 0, [0, 3], [0, 1]], spoiled_lse[0, 0, [1, 2]] = [np.nan, np.inf], [np.nan, np.inf]
    parts = jax.device_put([(out, lse), (spoiled, spoiled_lse)])
    merged, merged_lse = merge_attention(parts)
    np.testing.assert_array_equal(merged[0, 0], [[np.nan, 1], [np.nan] * 2, [np.nan] * 2, [1, np.inf], [1, 1]])
    assert np.isnan(merged_lse[0, 0]).tolist() == [False, True, True, False, False]


def test_cascade_reads_a_shared_prefix_once_for_all_rows():
    # Each row has tokens of its own behind the prefix, in a cache at true positions, and decodes two tokens.
    rows, heads, kv_heads, size, num_shared, num_own = 3, 4, 2, 5, 11, np.array([7, 2, 5])
    shared = normal(0, 2, 1, kv_heads, num_shared, size)
    own = normal(1, 2, rows, kv_heads, 7, size)
    query = normal(2, rows, heads, 2, size)
    index = np.arange(7)
    positions = np.where(index < num_own[:, None], num_shared + index, -1)
    query_positions = num_shared + num_own[:, None] - 2 + np.arange(2)

    def decode(query, shared, own, positions, query_positions):
        empty = init_ring_kv_cache(rows, kv_heads, size, max_len=23)
        cache, _ = empty.append({"keys": own[0], "values": own[1]}, positions)
        queries_of_all = query.swapaxes(0, 1).reshape(1, heads, rows * 2, size)
        out, lse = flash_attention(queries_of_all, *shared, return_lse=True)
        of_rows = tuple(x.reshape(heads, rows, 2, *x.shape[3:]).swapaxes(0, 1) for x in (out, lse))
        of_own = cached_attention(query, cache, query_positions, mask=masks.causal(), return_lse=True)
        cascade, _ = merge_attention([of_rows, of_own])
        prefixes = [jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in shared]
        at_start = np.broadcast_to(np.arange(num_shared), (rows, num_shared))
        keys, values = (jnp.concatenate(pair, axis=2) for pair in zip(prefixes, own, strict=True))
        mask = masks.at_positions(masks.causal(), query_positions, jnp.concatenate([at_start, positions], axis=1))
        return cascade, standard_attention(query, keys, values, mask=mask)

    given = jax.device_put((query, shared, own, positions.astype(np.int32), query_positions.astype(np.int32)))
    np.testing.assert_allclose(*jax.jit(decode)(*given), rtol=0, atol=1e-6)


def test_a_tree_of_drafts_attends_the_cache_and_its_own_branch():
    """Two guesses for the next token, and two guesses behind the first one; no draft is in the cache."""
    parents, depth = [-1, -1, 0, 0], np.array([0, 0, 1, 1])
    branches = [[0], [1], [0, 2], [0, 3]]
    ancestors = np.array([[key in branch for key in range(len(parents))] for branch in branches])
    length = 11
    key, value, query = normal(0, 1, 2, length, 5), normal(1, 1, 2, length, 5), normal(2, 1, 4, 4, 5)
    tree_key, tree_value = normal(3, 1, 2, 4, 5), normal(4, 1, 2, 4, 5)

    def decode(query, key, value, tree_key, tree_value):
        cache, _ = init_ring_kv_cache(1, 2, 5, max_len=13).append({"keys": key, "values": value}, np.arange(length))
        of_cache = cached_attention(query, cache, length + depth, mask=masks.causal(), return_lse=True)
        of_tree = flash_attention(query, tree_key, tree_value, mask=jax.device_put(ancestors), return_lse=True)
        return merge_attention([of_cache, of_tree])[0]

    out = jax.jit(decode)(query, key, value, tree_key, tree_value)
    for draft, branch in enumerate(branches):
        keys, values = (np.concatenate([x, y[:, :, branch]], axis=2) for x, y in ((key, tree_key), (value, tree_value)))
        alone = standard_attention(query[:, :, draft : draft + 1], *jax.device_put((keys, values)))
        np.testing.assert_allclose(out[:, :, draft : draft + 1], alone, rtol=0, atol=1e-6)


def test_parts_that_do_not_fit_are_refused(unchecked_shapes):
    out, lse = np.zeros((1, 2, 3, 5), np.float32), np.zeros((1, 2, 3), np.float32)
    refused = [
        ([], "at least one pair"),
        ([(out[0], lse)], "out must be of shape"),
        ([(out, lse), (out[..., :4], lse)], r"out of part 1 must be of shape \(1, 2, 3, 5\)"),
        ([(out, lse[..., None])], "lse of part 0 must be of shape"),
        ([(out, lse), (out.astype(np.float16), lse)], "outs must have one floating dtype.*float16.*of part 1"),
        ([(out, lse.astype(int))], "lses a floating one"),
    ]
    for parts, message in refused:
        with pytest.raises(ValueError, match=message):
            merge_attention(parts)
